"""Make an adapter's part from a T-LoRA (arXiv 2507.05964), and read the settings of its mask.

    vanilla         ΔW(λ) = s B m(λ) A
    with a start    ΔW(λ) = s (P diag(μ) m(λ) Q − P₀ diag(μ₀) m(λ) Q₀)

m(λ) keeps the first r(λ) = ⌊(1 − λ)^a (r − r_min)⌋ + r_min directions. The second formula is the
first one with 2 r directions that go on and off in pairs (`layers.residual`, `rank_mask_step` 2).

Files contain neither r_min nor a. They are arguments, or stand in the configuration of the
training, lycoris_config.json, beside the file; else they are 1, the default of all trainers.

The format of the authors' code (ControlGenAI/T-LoRA) is converted here; `lycoris` has LyCORIS':

    <attention>.processor.to_{q,k,v,out,q_proj,k_proj,v_proj}_lora.
        down.weight (r, d_in), up.weight (d_out, r)                             vanilla
        q_layer.weight, p_layer.weight, lambda_layer (1, r), base_q.weight,
        base_p.weight, base_lambda                                              ortho

The scale is 1. SDXL's files are safetensors of Diffusers' `save_attn_procs`; FLUX's are `lora.pt`.
FLUX's training gives a single block seven adapters; its attention runs three of them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.layers.residual import Triples, interleaved
from nara_diffusion.noise.level import is_number
from nara_diffusion.strict import check_tensors

from .adapter_part import AdapterPart

logger = logging.getLogger(__name__)

LYCORIS_CONFIG_NAME = "lycoris_config.json"
"""The name of LyCORIS' and SimpleTuner's configuration, beside the file."""

Factors = tuple[Tensor, Tensor]
"""A (n, d_in, …) and B (d_out, n, …) of one module."""


_KINDS = {
    **dict.fromkeys(("down.weight", "q_layer.weight", "base_q.weight"), "A"),
    **dict.fromkeys(("up.weight", "p_layer.weight", "base_p.weight"), "B"),
    **dict.fromkeys(("lambda_layer", "base_lambda"), "values"),
    "alpha": "",
}
"""{field of a format: the kind of its shape, see `check_layers`}."""


@dataclass(frozen=True)
class OtherFile:
    """A file of another project, with what is needed to convert it.

    Attributes:
        tensors: the file's tensors.
        path: the file; None for a dict of tensors.
        base: a function that returns the base model, if there is one.
        without_base: True if no base is needed, because only shapes are read.
        rank_mask: "min" and "exponent" of T-LoRA's mask; None means those beside the file.
    """

    tensors: Mapping[str, Tensor]
    path: Path | None = None
    base: Callable[[], nn.Module] | None = None
    without_base: bool = False
    rank_mask: Mapping[str, float] | None = None


def layers_of(
    tensors: Mapping[str, Tensor], key: re.Pattern[str], fields: Collection[str], method: str
) -> dict[str, dict[str, Tensor]]:
    """Return {layer: {field: tensor}}, with the fields in the order of `fields`.

    Args:
        tensors: the file's tensors.
        key: the pattern of a key, with groups named "layer" and "field".
        fields: the names of the tensors that each layer has.
        method: the name of the format in messages.

    Raises:
        ValueError: a key isn't one of this format, or a layer lacks a tensor.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = key.fullmatch(name)
        if not match or match["field"] not in fields or not isinstance(tensor, Tensor):
            raise ValueError(
                f"'{name}' is not a tensor of {method}, and a file with several methods can't be played."
            )
        layers.setdefault(match["layer"], {})[match["field"]] = tensor
    for layer, by_field in layers.items():
        if missing := [field for field in fields if field not in by_field]:
            raise ValueError(
                f"{method} also has '{layer}.{missing[0]}'. The file is damaged: download it again."
            )
        layers[layer] = {field: by_field[field] for field in fields}
    return layers


def check_layers(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Tensor]],
    base_shapes: Mapping[str, torch.Size] | None = None,
) -> int:
    """Check the shapes, dtypes and values of a T-LoRA's tensors, and return the rank.

    Args:
        tensors: the file's tensors.
        layers: those of `layers_of`. A comes first, and B second.
        base_shapes: {layer: the shape of the base's weight}; None means the sizes of A and B.

    Raises:
        ValueError: a tensor has a wrong shape, dtype or value, or a layer another rank.
    """
    ranks = {layer: next(iter(layers[layer].values())).shape[:1].numel() for layer in layers}
    rank = mode(ranks.values())
    expected = {}
    for layer, by_field in layers.items():
        if ranks[layer] != rank:
            raise ValueError(
                f"'{layer}' has rank {ranks[layer]}, but most layers have {rank}. T-LoRA's mask is for one rank."
            )
        A, B = (tensor.shape for tensor in list(by_field.values())[:2])
        d_out, d_in, *kernel = (base_shapes or {}).get(layer, ((*B, 0)[0], (*A, 0, 0)[1], *A[2:]))
        ones = (1,) * len(kernel)
        shapes = {"A": (rank, d_in, *ones), "B": (d_out, rank, *ones), "values": (1, rank), "": ()}
        for field, tensor in by_field.items():
            # LyCORIS stores alpha as given, e.g. as an integer
            dtype = tensor.dtype if field == "alpha" else torch.float32
            like = torch.empty(shapes[_KINDS[field]], dtype=dtype, device="meta")
            expected[f"{layer}.{field}"] = like
    check_tensors(tensors, expected)
    return rank


def tlora_part(
    file: OtherFile,
    factors: Mapping[str, Factors],
    step: int,
    noise_convention: str | None,
    alpha: float | None = None,
    base_model: str | None = None,
) -> AdapterPart:
    """Return the part of a T-LoRA.

    Args:
        file: the file, for the settings of the mask.
        factors: {module: A and B}, of equal ranks.
        step: the number of directions that go on and off together.
        noise_convention: the name of the definition of λ.
        alpha: the scale is alpha / r, with r the rank of the file; None means a scale of 1.
        base_model: the name of the base model, if it is known.
    """
    rank = len(next(iter(factors.values()))[0]) // step
    least, exponent = mask_settings(file, rank)
    scaled: Any = step * (rank if alpha is None else alpha)  # PEFT declares an integer
    config = NaraConfig(
        core_type="rank_mask",
        r=step * rank,
        lora_alpha=scaled,
        rank_mask_min=step * least,
        rank_mask_exponent=exponent,
        rank_mask_step=step,
        target_modules="|".join(map(re.escape, sorted(factors))),
        noise_convention=noise_convention,
        noise_level_per="sample",
        base_model_name_or_path=base_model,
    )
    tensors = {
        f"{name}.lora_{letter}.weight": factor.contiguous()
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    return AdapterPart(config, tensors)


def mask_settings(file: OtherFile, rank: int) -> tuple[int, float]:
    """Return r_min and the exponent, and warn if neither the caller nor a file states them.

    Raises:
        ValueError: a setting is invalid, or the configuration beside the file is damaged or belongs
            to another adapter.
    """
    defaults: dict[str, float] = {"min": 1, "exponent": 1.0}
    beside = None if file.path is None else file.path.with_name(LYCORIS_CONFIG_NAME)
    origin = "rank_mask"
    if file.rank_mask is not None:
        settings = {**defaults, **file.rank_mask}
    elif beside is not None and beside.is_file():
        origin = f"'{beside}'"
        try:
            content = dict(json.loads(beside.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{origin} can't be read ({error}). Restore it, or pass rank_mask={defaults}."
            ) from None
        if content.get("algo", "tlora") != "tlora" or content.get("linear_dim", rank) != rank:
            raise ValueError(
                f"{origin} is not of this T-LoRA of rank {rank}: it has algo {content.get('algo')!r} and "
                f"linear_dim {content.get('linear_dim')!r}. Move it away, or pass rank_mask={defaults}."
            )
        settings = {
            "min": content.get("tlora_min_rank", 1),
            "exponent": content.get("tlora_alpha", 1.0),
        }
    else:
        settings = defaults
        logger.warning(
            "%s doesn't contain the settings of T-LoRA's mask. The trainers' defaults are used: rank_mask=%s. "
            "If it was trained with others, pass them, or put the training's %s beside the file.",
            "The dict" if file.path is None else f"'{file.path}'",
            defaults,
            LYCORIS_CONFIG_NAME,
        )
    least, exponent = settings["min"], settings["exponent"]
    is_valid = least in range(1, rank + 1) and is_number(exponent) and exponent > 0
    if settings.keys() != defaults.keys() or not is_valid:
        raise ValueError(
            f"{origin} gives T-LoRA's mask {settings}, expected 'min' from 1 to the file's rank {rank} and "
            "'exponent' greater than 0."
        )
    return int(least), exponent


REPOSITORY_KEY = re.compile(
    r"(?P<layer>(?:down_|up_|mid_|single_|transformer_)[\w.]+\.processor\.to_(?:[qkv](?:_proj)?|out)_lora)"
    r"\.(?P<field>.+)"
)
_PROJECTIONS = {
    **{name: f"to_{name}" for name in "qkv"},
    "out": "to_out.0",
    **{f"{name}_proj": f"add_{name}_proj" for name in "qkv"},
}
_VANILLA = ("down.weight", "up.weight")
_ORTHO = (
    *("q_layer.weight", "p_layer.weight", "lambda_layer"),
    *("base_q.weight", "base_p.weight", "base_lambda"),
)


def convert_repository(file: OtherFile) -> AdapterPart:
    """Return the part for the denoiser.

    Raises:
        ValueError: a key or a tensor isn't one of T-LoRA's. The message names it.
    """
    is_ortho = any(key.endswith("lambda_layer") for key in file.tensors)
    fields, method = (_ORTHO, "an ortho T-LoRA") if is_ortho else (_VANILLA, "a vanilla T-LoRA")
    layers = layers_of(file.tensors, REPOSITORY_KEY, fields, method)
    check_layers(file.tensors, layers)
    factors: dict[str, Factors] = {}
    for layer, tensors in layers.items():
        attention, _, projection = layer.removesuffix("_lora").partition(".processor.to_")
        if projection not in "qkv" and layer.startswith("single_"):
            continue
        Q, P, *base_tensors = tensors.values()
        if is_ortho:
            values, Q0, P0, values0 = base_tensors
            Q, P = interleaved(Triples(P, values, Q), Triples(P0, values0, Q0))
        factors[f"{attention}.{_PROJECTIONS[projection]}"] = Q, P
    is_flow = any(layer.startswith("transformer_blocks.") for layer in layers)
    return tlora_part(
        file,
        factors,
        step=2 if is_ortho else 1,
        noise_convention="flow" if is_flow else "timestep",
    )
