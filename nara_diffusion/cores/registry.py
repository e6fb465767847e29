"""Make the cores of an adapter from its configuration: core types by name, groups of layers."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .core import (
    BinsCore,
    ConstantCore,
    Core,
    CoreInit,
    HypernetworkCore,
    IdentityCore,
    KnotsCore,
    NoiseEmbedding,
    RankMaskCore,
)


class CoreConfig(Protocol):
    """The fields of a `NaraConfig` that describe cores."""

    r: int
    core_type: str
    core_scale: float
    core_hidden_dims: tuple[int, ...]
    core_init: CoreInit
    core_sharing: Literal["global", "module_type", "layer"]
    core_knots: int
    core_bins: int
    noise_embedding: Literal["fourier", "mlp", "raw"]
    noise_embedding_dim: int
    fourier_scale: float
    rank_mask_min: int | None
    strength: Any


CoreMaker = Callable[[Any, int], Core]
"""(the NaraConfig, r) → the core."""

_BUILT_IN: dict[str, CoreMaker] = {
    "hypernetwork": lambda config, rank: HypernetworkCore(
        rank,
        scale=config.core_scale,
        hidden_dims=config.core_hidden_dims,
        init=config.core_init,
        embedding=NoiseEmbedding(
            config.noise_embedding, config.noise_embedding_dim, config.fourier_scale
        ),
    ),
    "constant": lambda config, rank: ConstantCore(
        rank, scale=config.core_scale, init=config.core_init
    ),
    "identity": lambda config, rank: IdentityCore(rank),
    "rank_mask": lambda config, rank: RankMaskCore(rank, config.rank_mask_min),
    "bins": lambda config, rank: BinsCore(rank, config.core_bins),
    "knots": lambda config, rank: KnotsCore(rank, config.core_knots, scale=config.core_scale),
}
BUILT_IN = tuple(_BUILT_IN)
CUSTOM: dict[str, CoreMaker] = {}
"""Name → maker of each custom core, filled by `register_core`."""


def check_core_type(name: object) -> None:
    """Raise ValueError if there is no core type with this name."""
    core_types = (*BUILT_IN, *CUSTOM)
    if name not in core_types:
        raise ValueError(
            f"core_type is {name!r}: choose one of {', '.join(map(repr, core_types))}. If it is a custom core, first "
            f"import the module that calls nara_diffusion.register_core({name!r}, factory), as in the adapter's "
            "training; in the train scripts, --core_module does this."
        )


def build_core(config: CoreConfig, rank: int) -> Core:
    """Return the core that a NaraConfig describes, for layers of rank up to `rank`."""
    make = CUSTOM.get(config.core_type) or _BUILT_IN[config.core_type]
    return make(config, rank)


def needs_noise(config: CoreConfig) -> bool:
    """Return whether the core or the strength of a NaraConfig depends on λ."""
    with torch.device("meta"):
        return config.strength is not None or build_core(config, config.r).needs_noise


# ---------------------------------------------------------------------- the cores of one adapter

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
        """Return C = I + D (b or 1, r, r), float32, of one group at λ (b,)."""
        D: Tensor = self[group].at(noise_level)  # type: ignore[operator]
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
