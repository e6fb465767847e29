"""Hold the cores of one adapter by group of layers, and name the groups and their tensors."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .registry import CoreConfig, build_core

HOLDER_NAME = "lora_core"
"""The attribute of an adapted model that holds its cores.

Parameters are named `lora_core.cores.{adapter}.{group}.…`, since other programs train the
parameters with "lora_" in their names.
"""
NAME_IN_FILES = "nara_core"
"""Its name in adapter files: `nara_core.{group}.…`."""
SHARED = "shared"
"""The group of all layers."""


class CoreSet(nn.ModuleDict):
    """The cores of one adapter by group of layers, made by `make_cores`."""

    @property
    def needs_noise(self) -> bool:
        return any(bool(core.needs_noise) for core in self.values())

    def matrix(self, group: str, noise_level: Tensor | None) -> Tensor:
        """Return C = I + D (b or 1, r, r), float32, of one group at λ (b,), without film's β."""
        D: Tensor = self[group].at(noise_level)  # type: ignore[operator]
        D = D[..., : D.shape[-2]]
        return torch.eye(D.shape[-1], dtype=D.dtype, device=D.device) + D


def make_cores(config: CoreConfig, ranks: dict[str, int]) -> CoreSet:
    """Return the cores that a NaraConfig describes.

    Args:
        ranks: the largest rank among the layers of each group.
    """
    return CoreSet({group: build_core(config, rank) for group, rank in ranks.items()})


def core_group(config: CoreConfig, module_name: str, rank: int) -> str:
    """Return the name of the core that an adapted module of this rank reads.

    Depending on `core_sharing`, all modules share a core, all modules of one name share a core, or
    each module has its own. Cores without parameters that depend on the rank are shared by rank.
    """
    if config.core_type in ("rank_mask", "bins"):
        return f"rank-{rank}"
    if config.core_sharing == "global":
        return SHARED
    if config.core_sharing == "module_type":
        group = re.sub(r"(\.\d+)+$", "", module_name).rpartition(".")[2]  # to_out.0 → to_out
    else:
        group = module_name.replace(".", "-")
    # attributes of `nn.ModuleDict`; "at" and "groups" once were, so files contain them with "_"
    taken = hasattr(CoreSet, group) or keyword.iskeyword(group) or group in ("at", "groups")
    return f"{group}_" if taken else group


def is_core_key(key: str) -> bool:
    """Return whether a name, in a file or a model, belongs to a core's tensor.

    Only a NaRA has such tensors.
    """
    return not {NAME_IN_FILES, HOLDER_NAME}.isdisjoint(key.split("."))


def ranks_by_group(config: CoreConfig, ranks: Mapping[str, int]) -> dict[str, int]:
    """Return {group of layers that share a core: the largest of their ranks}.

    Args:
        ranks: {adapted module: its rank}.
    """
    largest: dict[str, int] = {}
    for name, rank in ranks.items():
        group = core_group(config, name, rank)
        largest[group] = max(rank, largest.get(group, 0))
    return largest


def with_current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `tensors` of a file, with the current name of the shared core.

    In earlier versions, its name was `nara_core.global`.
    """
    return {
        key.replace("nara_core.global.", f"{NAME_IN_FILES}.{SHARED}."): tensor
        for key, tensor in tensors.items()
    }
