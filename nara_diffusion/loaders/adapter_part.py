"""Define a part of an adapter, for one component: its configuration and its tensors.

A part of a file is compared with its own configuration, without the base model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor

from nara_diffusion.config import ABSENT, NaraConfig, is_idle
from nara_diffusion.cores.core_set import NAME_IN_FILES, is_core_key, make_cores, ranks_by_group
from nara_diffusion.cores.registry import BUILT_IN
from nara_diffusion.strict import check_tensors
from nara_diffusion.utils.wording import listed

_ALWAYS_WRITTEN = (
    "r",
    "lora_alpha",
    "target_modules",
    "core_type",
    "core_scale",
    "use_rslora",
    "use_dora",
)
_OF_ONE_MACHINE = (
    "auto_mapping",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
)
"""Fields that say where a configuration was made or runs. The others describe the adapter."""


@dataclass(frozen=True)
class AdapterPart:
    """The part of an adapter for one component.

    Attributes:
        config: the configuration of the part.
        tensors: the tensors of the part, by their names in the component.
    """

    config: NaraConfig
    tensors: dict[str, Tensor]

    @property
    def modules(self) -> dict[str, int]:
        """Return {adapted module: its rank}."""
        names = [key.partition(".lora_")[0] for key in self.tensors if ".lora_" in key]
        return {name: by_pattern(self.config.rank_pattern, name, self.config.r) for name in names}

    @property
    def core(self) -> dict[str, Tensor]:
        """Return {name in the core: tensor} for the core's tensors."""
        keys = filter(is_core_key, self.tensors)
        return {key.removeprefix(f"{NAME_IN_FILES}."): self.tensors[key] for key in keys}

    @property
    def core_ranks(self) -> dict[str, int]:
        """Return {group of layers that share a core: the largest of their ranks}."""
        return ranks_by_group(self.config, self.modules)


def config_to_fields(config: LoraConfig) -> dict[str, Any]:
    """Return a configuration's fields as JSON values.

    Fields that depend on the machine are left out, and so are fields that are None, unless files
    without them have another value.
    """
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in _OF_ONE_MACHINE and (value is not None or name in ABSENT)
    }


def config_from_fields(json_values: Mapping[str, Any], origin: str) -> NaraConfig:
    """Return the configuration from `config_to_fields`, or from PEFT's adapter_config.json.

    Raises:
        ValueError: a field is missing, unknown or invalid. The message names the `origin`.
    """
    if missing := [name for name in _ALWAYS_WRITTEN if name not in json_values]:
        raise ValueError(
            f"The configuration of {origin} has no field {listed(missing)}, which every NaRA file contains. The file "
            "is damaged: download or save it again."
        )
    names = {field.name for field in fields(NaraConfig)}
    arguments = {
        name: value
        for name, value in {**ABSENT, **json_values}.items()
        if name not in _OF_ONE_MACHINE and (name in names or not is_idle(name, value))
    }
    try:
        return NaraConfig(**arguments)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        # PEFT's checks raise the last two errors
        raise ValueError(f"The configuration of {origin} is invalid: {error}") from error


Value = TypeVar("Value")


def by_pattern(pattern: Mapping[str, Value] | None, name: str, default: Value) -> Value:
    """Return a module's value from PEFT's rank_pattern or alpha_pattern."""
    pattern = pattern or {}
    return pattern.get(str(get_pattern_key(list(pattern), name)), default)


def configured_scaling(config: LoraConfig, name: str, rank: int) -> float:
    """Return a module's α / r, or α / √r for rsLoRA."""
    alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def check_part(part: AdapterPart, *, beside: bool, for_model: bool) -> None:
    """Compare the tensors of a file with those that its configuration describes.

    Args:
        part: the part of the file to check.
        beside: True if a file of this form may also contain biases, tokens, embeddings and
            `modules_to_save`.
        for_model: True to compare only the modules with `target_modules`, because the caller will
            compare the tensors with those of a model.

    Raises:
        ValueError: no module has factors, or `target_modules` don't name one that has; or
            `check_tensors` raises an error.
    """
    if not part.modules:
        raise ValueError(
            "The adapter has no A and B of any module. Download or save the file again."
        )
    targets = part.config.target_modules
    for name in part.modules if targets not in (None, "all-linear") else ():
        if not check_target_module_exists(part.config, name.partition(".base_layer")[0]):
            raise ValueError(
                f"The adapter has A and B of '{name}', which is not in its target_modules {targets}. The file is "
                "damaged: download or save it again."
            )
    if for_model:
        return
    with torch.device("meta" if part.config.core_type in BUILT_IN else "cpu"):
        cores = make_cores(part.config, part.core_ranks)
    expected = cores.state_dict(prefix=f"{NAME_IN_FILES}.")
    for name, rank in part.modules.items():
        expected |= _factors(part, name, rank)
    others = {
        key: tensor
        for key, tensor in part.tensors.items()
        if beside and _may_stand_beside(part.config, key, tensor)
    }
    check_tensors(part.tensors, expected, others | expected)


def _factors(part: AdapterPart, name: str, rank: int) -> dict[str, Tensor]:
    """Return {key: an empty float32 tensor of the expected shape} for a module's factors.

    The sizes of the base's layer are taken from the file.
    """
    tensors = part.tensors
    A, B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    if any(key.startswith(f"{name}.lora_embedding_") for key in tensors):
        A, B = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    shape_A, shape_B = _shape(tensors.get(A)), _shape(tensors.get(B))
    d_out, width = shape_B[:2]
    kernel = (1,) * len(shape_A[2:])
    is_grouped = kernel and width and rank % width == 0  # then B is (d_out, rank / groups, 1, …)
    shapes: dict[str, tuple[int, ...]] = {
        A: (rank, *shape_A[1:]),
        B: (d_out, width if is_grouped else rank, *kernel),
    }
    if part.config.use_dora:
        key = f"{name}.lora_magnitude_vector"
        key = f"{key}.weight" if f"{key}.weight" in tensors else key
        shapes[key] = (1, d_out, *kernel) if kernel else (d_out,)
    if part.config.lora_bias:
        shapes[f"{name}.lora_B.bias"] = (d_out,)
    return {
        key: torch.empty(shape, dtype=torch.float32, device="meta") for key, shape in shapes.items()
    }


def _shape(tensor: object) -> tuple[int, ...]:
    """Return a tensor's shape, extended to at least two axes."""
    shape = tuple(getattr(tensor, "shape", ()))
    return shape if len(shape) > 1 else (*shape, 1, 1)[:2]


def _may_stand_beside(config: NaraConfig, key: str, tensor: object) -> bool:
    """Return whether a tensor other than a factor, such as a bias, may be in the file."""
    if not isinstance(tensor, Tensor) or ".lora_" in key or is_core_key(key):
        return False
    module, _, kind = key.rpartition(".")
    patterns = [rf"(^|.*\.){name}($|\..*)" for name in config.modules_to_save or ()]
    is_saved = any(re.match(pattern, module) for pattern in patterns)
    is_embedding = (
        kind == "weight" and tensor.dim() == 2
    )  # PEFT saves those of a resized vocabulary
    is_bias = kind == "bias" and config.bias != "none"
    return is_saved or is_embedding or is_bias or "trainable_tokens" in kind
