"""Write a T-LoRA as LyCORIS (`algo: tlora`), SimpleTuner and ComfyUI's T-LoRA node read it.

    lycoris_<module, with _ for .>.q_layer.weight (k, d_in), .p_layer.weight (d_out, k),
    .lambda_layer (1, k), .alpha ()

    ΔW(t) = alpha/k · (P diag(σ m(t)) Q − P0 diag(σ0 m(t)) Q0)

LyCORIS always subtracts the first k singular triples (P0, σ0, Q0) of the base weight, which aren't
in the file. An adapter that was trained with them (lora_a_init="residual_base", see
layers/residual.py) is written exactly. No other adapter can be: for a direction that goes on, its
s b a has to be added and σ0 p0 q0 to be compensated. This sum has rank 2, and LyCORIS' direction
has rank 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.cores.registry import build_core
from nara_diffusion.loaders.adapter_part import AdapterPart
from nara_diffusion.loaders.tensor_files import OTHER_WEIGHTS_NAMES, save_tensors
from nara_diffusion.loaders.tlora import LYCORIS_CONFIG_NAME
from nara_diffusion.utils.files import atomic_write_files

from .original_names import check_base, parts_of
from .plain_lora import PlainLoraLayer, extra_tensors, layers_of_tensors

LYCORIS_WEIGHTS = OTHER_WEIGHTS_NAMES[0]
"""The name that SimpleTuner gives the file."""


def save_lycoris(part: AdapterPart, folder: Path, base: str | None = None) -> None:
    """Write both files into `folder`, or nothing.

    Args:
        base: None for the module names of Diffusers, which SimpleTuner uses; for ComfyUI "sd15",
            "sdxl" or "wan", the model that the adapter was trained on.

    Raises:
        ValueError: LyCORIS can't express the adapter; or ComfyUI has no such module.
    """
    config = part.config
    if config.lora_a_init != "residual_base":
        raise ValueError(
            "LyCORIS' T-LoRA subtracts singular vectors of the base weight, and this adapter has lora_a_init="
            f"{config.lora_a_init!r}, so it was trained without them: it can't be written. Train with --adapter tlora "
            "--adapter_options lora_a_init=residual_base."
        )
    if config.strength is not None or config.rank_pattern or extra_tensors(part.tensors):
        raise ValueError(
            "LyCORIS' T-LoRA needs strength 1, layers of one rank and nothing else, so a strength over λ, rank_pattern "
            "and trained biases can't be written."
        )
    layers = layers_of_tensors(config, part.tensors)
    names = {name: name for name in layers} if base is None else names_in_comfyui(layers, base)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        fields = lycoris_fields(name, layer)
        key = f"lycoris_{names[name].replace('.', '_')}"
        tensors |= {f"{key}.{field}": tensor for field, tensor in fields.items()}
    core: Any = build_core(config, config.r)
    settings = {
        "algo": "tlora",
        "multiplier": 1.0,
        "linear_dim": config.r // 2,
        "linear_alpha": fields["alpha"].item(),
        "tlora_min_rank": core.min_rank // core.step,
        "tlora_alpha": core.exponent,
    }
    with atomic_write_files(folder) as partial:
        save_tensors(tensors, partial / LYCORIS_WEIGHTS)
        text = json.dumps(settings, indent=2) + "\n"
        (partial / LYCORIS_CONFIG_NAME).write_text(text, encoding="utf-8")


def lycoris_fields(name: str, layer: PlainLoraLayer) -> dict[str, Tensor]:
    """Return LyCORIS' tensors of one layer, {name of the field: tensor}.

    Raises:
        ValueError: the layer is a convolution of another kernel than 1, or has groups.
    """
    if layer.A.dim() > 2 and (layer.A[0, 0].numel() > 1 or layer.groups > 1):
        raise ValueError(
            f"'{name}' is a convolution with a kernel or with groups, for which LyCORIS has no T-LoRA. Train without "
            "it."
        )
    scaled = layer.B[:, 0::2].float()  # P diag(σ), (d_out, k, …)
    values = scaled.norm(dim=0, keepdim=True)  # (1, k, …)
    P = scaled / values.clamp(min=torch.finfo(values.dtype).tiny)
    return {
        "q_layer.weight": layer.A[0::2],
        "p_layer.weight": P.to(layer.B.dtype),
        "lambda_layer": values.view(1, -1),
        "alpha": torch.tensor(layer.scaling * layer.rank / 2),
    }


def names_in_comfyui(layers: dict[str, PlainLoraLayer], base: str) -> dict[str, str]:
    """Return {name in Diffusers: name in ComfyUI} of the modules.

    Raises:
        ValueError: ComfyUI has no such module, or fuses several into one.
    """
    check_base(layers, base)
    names = {}
    for original, modules in parts_of(layers, base).items():
        if len(modules) > 1:
            raise ValueError(
                f"ComfyUI's {base} has '{original}' for {', '.join(map(str, modules))} together, whose singular "
                "vectors are others. Leave out --base, for programs that use Diffusers' names."
            )
        names[str(modules[0])] = original
    return names
