"""The cores of one adapter, and which layers read which of them."""

from __future__ import annotations

import keyword
import re

import torch
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import build_core, is_tied_to_rank
from nara_diffusion.noise.level import NoiseSignals

SHARED = "shared"
"""The group of all layers, and `nara_core.shared.…` in files."""

_TAKEN_BEFORE = ("at", "groups")
"""Names of groups that have an underscore in files, as names of `nn.ModuleDict`'s attributes have."""


class CoreSet(nn.ModuleDict):
    """Group of layers → its core; made by `make_cores`."""

    @property
    def needs_noise(self) -> bool:
        return any(bool(core.needs_noise) for core in self.values())

    @property
    def needs_density(self) -> bool:
        return any(bool(core.needs_density) for core in self.values())

    def matrix(self, group: str, signals: NoiseSignals | None) -> Tensor:
        """C (b or 1, r, r), float32, of one group at `signals`, which a core without noise input doesn't read."""
        return self[group].at(*(signals or ()))  # type: ignore[operator]


def make_cores(config: NaraConfig, ranks: dict[str, int]) -> CoreSet:
    """The cores that `config` describes. `ranks`: group → the largest rank among its layers."""
    return CoreSet({group: build_core(config, rank) for group, rank in ranks.items()})


def core_group(config: NaraConfig, module_name: str, rank: int) -> str:
    """The name of the core that an adapted module of this rank reads.

    `core_sharing` makes it one for all modules, one for all modules of that name, or one for each module. A core that
    has no parameters, but depends on the rank, is one for all modules of that rank.
    """
    if is_tied_to_rank(config):
        return f"rank-{rank}"
    if config.core_sharing == "global":
        return SHARED
    if config.core_sharing == "module_type":
        group = re.sub(r"(\.\d+)+$", "", module_name).rpartition(".")[2]  # to_out.0 → to_out
    else:
        group = module_name.replace(".", "-")
    taken = hasattr(CoreSet, group) or keyword.iskeyword(group) or group in _TAKEN_BEFORE
    return f"{group}_" if taken else group


def core_tensors(config: NaraConfig, ranks: dict[str, int]) -> dict[str, Tensor]:
    """Name → a tensor, without values, of what is saved of those cores."""
    with torch.device("meta"):
        return make_cores(config, ranks).state_dict()
