"""Define a part of an adapter, for one component: its configuration and its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, TypeVar

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from nara_diffusion.config import ABSENT, NaraConfig, is_idle
from nara_diffusion.cores.core_set import NAME_IN_FILES, is_core_key, ranks_by_group

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
        ranks, r = self.config.rank_pattern, self.config.r
        return {name: by_pattern(ranks, name, r) for name in names}

    @property
    def core(self) -> dict[str, Tensor]:
        """Return {name in the core: tensor} for the core's tensors."""
        prefix = f"{NAME_IN_FILES}."
        keys = filter(is_core_key, self.tensors)
        return {key.removeprefix(prefix): self.tensors[key] for key in keys}

    @property
    def core_ranks(self) -> dict[str, int]:
        """Return {group of layers that share a core: the largest of their ranks}."""
        return ranks_by_group(self.config, self.modules)


def config_to_fields(config: LoraConfig) -> dict[str, Any]:
    """Return a configuration's fields as JSON values.

    Fields that depend on the machine are left out, and so are fields that are None, unless files
    without them have another value.
    """
    json_values = {}
    for name, value in config.to_dict().items():
        if name in _OF_ONE_MACHINE or (value is None and name not in ABSENT):
            continue
        value = sorted(value) if isinstance(value, set) else value
        json_values[name] = value.value if isinstance(value, Enum) else value
    return json_values


def config_from_fields(json_values: Mapping[str, Any], origin: str) -> NaraConfig:
    """Return the configuration from `config_to_fields`, or from PEFT's adapter_config.json.

    Raises:
        ValueError: a field is missing, unknown or invalid. The message names the `origin`.
    """
    for name in _ALWAYS_WRITTEN:
        if name not in json_values:
            raise ValueError(
                f"The configuration of {origin} has no field '{name}', which every NaRA file contains. The file is "
                "damaged: download or save it again."
            )
    names = {field.name for field in fields(NaraConfig)}.difference(_OF_ONE_MACHINE)
    arguments: dict[str, Any] = {**ABSENT}
    for name, value in json_values.items():
        if name in names or not (name in _OF_ONE_MACHINE or is_idle(name, value)):
            arguments[name] = value
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
