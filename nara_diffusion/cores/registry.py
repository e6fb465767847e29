"""Find the types of cores by name, and make the core that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from .core import Core, HypernetworkCore, NoiseEmbedding
from .other_cores import BinsCore, ConstantCore, FilmCore, IdentityCore, KnotsCore, RankMaskCore


class CoreConfig(Protocol):
    """The fields of a `NaraConfig` that all cores have in common."""

    r: int
    core_type: str
    core_sharing: Literal["global", "module_type", "layer"]
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
    "rank_mask": lambda config, rank: RankMaskCore(
        rank, config.rank_mask_min, config.rank_mask_exponent, config.rank_mask_step
    ),
    "bins": lambda config, rank: BinsCore(rank, config.core_bins),
    "knots": lambda config, rank: KnotsCore(rank, config.core_knots, scale=config.core_scale),
    "film": lambda config, rank: FilmCore(rank),
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
