"""The part of an adapter for one component: its configuration, its tensors, and the check of one by the other.

A file is compared here with its own configuration, without its base model. What only the base model can say, such as
the sizes of its layers, is compared when the adapter is loaded; `strict.check_tensors` does both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor

from nara_diffusion.config import NaraConfig, is_idle
from nara_diffusion.cores.registry import BUILT_IN, NAME_IN_FILES, core_group, make_cores
from nara_diffusion.strict import check_tensors, is_core_key

_ALWAYS_WRITTEN = (
    "r",
    "lora_alpha",
    "target_modules",
    "core_type",
    "core_scale",
    "use_rslora",
    "use_dora",
)
_OF_ONE_MACHINE = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
    ]
)
"""Fields that say where a configuration was made or runs; the others describe the adapter."""


@dataclass(frozen=True)
class AdapterPart:
    """The part of an adapter for one component: configuration, and tensors by their names in the component."""

    config: NaraConfig
    tensors: dict[str, Tensor]

    @property
    def modules(self) -> dict[str, int]:
        """{adapted module: its rank}."""
        names = dict.fromkeys(key.partition(".lora_")[0] for key in self.tensors if ".lora_" in key)
        return {name: by_pattern(self.config.rank_pattern, name, self.config.r) for name in names}

    @property
    def core(self) -> dict[str, Tensor]:
        """{name in the core: tensor} of the core's tensors."""
        return {
            key.removeprefix(f"{NAME_IN_FILES}."): tensor
            for key, tensor in self.tensors.items()
            if is_core_key(key)
        }

    @property
    def core_ranks(self) -> dict[str, int]:
        """{group of layers that share a core: the largest of their ranks}."""
        found: dict[str, int] = {}
        for name, rank in self.modules.items():
            group = core_group(self.config, name, rank)
            found[group] = max(rank, found.get(group, 0))
        return found


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of PEFT's rank_pattern or alpha_pattern for a module."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)  # type: ignore[arg-type]


def configured_scaling(config: LoraConfig, name: str, rank: int) -> float:
    """α / r, or α / √r for rsLoRA, of the module of that name."""
    alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


# ---------------------------------------------------------------------- fields of a configuration


def config_to_fields(config: NaraConfig) -> dict[str, Any]:
    """Return a configuration's fields as JSON values.

    Fields of one machine and fields that are None are left out.
    """
    found = {}
    for name, value in config.to_dict().items():
        if name in _OF_ONE_MACHINE or value is None:
            continue
        if isinstance(value, Enum):
            value = value.value
        found[name] = sorted(value) if isinstance(value, set) else value
    return found


def config_from_fields(given: Mapping[str, Any], origin: str) -> NaraConfig:
    """Return the configuration from `config_to_fields`, or from PEFT's adapter_config.json.

    Raises:
        ValueError: a field is missing, unknown or wrong; the message names the `origin`.
    """
    known = {field.name for field in fields(NaraConfig)}
    own = {}
    for name, value in given.items():
        if name in _OF_ONE_MACHINE or (name not in known and is_idle(name, value)):
            continue
        own[name] = value
    for name in _ALWAYS_WRITTEN:
        if name not in own:
            raise ValueError(
                f"The configuration of {origin} lacks {name}, which every NaRA's file has: damaged."
            )
    try:
        return NaraConfig(**own)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        # PEFT's checks raise the last two
        raise ValueError(f"The configuration of {origin} is refused: {error}") from error


# ---------------------------------------------------------------------- the check


def check_part(part: AdapterPart, *, beside: bool) -> None:
    """Compare the tensors of a file with those that its configuration describes.

    Args:
        beside: whether a file of this form may hold biases, tokens, embeddings and `modules_to_save` too.

    Raises:
        ValueError: no module has factors, or one that `target_modules` doesn't name; or as `check_tensors`.
    """
    if not part.modules:
        raise ValueError("it holds no A and B of any module: download or save it again.")
    if others := [name for name in part.modules if not _is_target(part.config, name)]:
        raise ValueError(
            f"it holds factors of '{others[0]}', a module that its target_modules {part.config.target_modules} don't "
            "name: it is damaged, download or save it again."
        )
    expected = _core_tensors(part)
    for name, rank in part.modules.items():
        expected |= _factors(part, name, rank)
    others = {
        key: t
        for key, t in part.tensors.items()
        if beside and _may_stand_beside(part.config, key, t)
    }
    check_tensors(part.tensors, expected, {**others, **expected})


def _is_target(config: NaraConfig, name: str) -> bool:
    if config.target_modules in (
        None,
        "all-linear",
    ):  # which PEFT replaces by names when it adds an adapter
        return True
    return bool(check_target_module_exists(config, name.partition(".base_layer")[0]))


def _core_tensors(part: AdapterPart) -> dict[str, Tensor]:
    with torch.device("meta" if part.config.core_type in BUILT_IN else "cpu"):
        cores = make_cores(part.config, part.core_ranks)
    return {f"{NAME_IN_FILES}.{key}": tensor for key, tensor in cores.state_dict().items()}


def _factors(part: AdapterPart, name: str, rank: int) -> dict[str, Tensor]:
    """{key: a tensor like it} of a module's factors; sizes of the base's layer are those of the file."""
    embedding, layer = f"{name}.lora_embedding_", f"{name}.lora_"
    is_embedding = any(key.startswith(embedding) for key in part.tensors)
    A, B = (f"{embedding}{each}" if is_embedding else f"{layer}{each}.weight" for each in "AB")
    shapes = {key: _shape(part.tensors.get(key)) for key in (A, B)}
    kernel = (1,) * len(shapes[A][2:])
    width = shapes[B][1]  # the rank, by the groups of a convolution
    found: dict[str, tuple[int, ...]] = {
        A: (rank, *shapes[A][1:]),
        B: (shapes[B][0], width if kernel and width and rank % width == 0 else rank, *kernel),
    }
    if part.config.use_dora:
        magnitude = f"{layer}magnitude_vector"
        key = next(
            (key for key in (f"{magnitude}.weight", magnitude) if key in part.tensors), magnitude
        )
        found[key] = (1, shapes[B][0], *kernel) if kernel else shapes[B][:1]
    if part.config.lora_bias:
        found[f"{layer}B.bias"] = shapes[B][:1]
    return {key: _like(part.tensors.get(key), shape) for key, shape in found.items()}


def _shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor, as one of two axes or more."""
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
    return shape if len(shape) > 1 else (*shape, 1, 1)[:2]


def _like(tensor: Any, shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape on "meta", in the dtype of `tensor` if a layer computes in it."""
    is_real = (
        isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > 1
    )
    return torch.empty(shape, dtype=tensor.dtype if is_real else torch.float32, device="meta")


def _may_stand_beside(config: NaraConfig, key: str, tensor: Any) -> bool:
    """Whether a tensor may be a bias, token, embedding or module that is trained or stored beside the factors."""
    if not isinstance(tensor, Tensor) or ".lora_" in key or is_core_key(key):
        return False
    module, _, kind = key.rpartition(".")
    saved = any(
        re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.modules_to_save or ()
    )
    is_embedding = (
        kind == "weight" and tensor.dim() == 2
    )  # PEFT saves those of a vocabulary that was resized
    is_bias = kind == "bias" and config.bias != "none"
    return saved or is_embedding or is_bias or "trainable_tokens" in kind
