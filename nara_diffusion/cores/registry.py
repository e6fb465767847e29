"""Find the types of cores by name, and make the core that a configuration describes.

Users register custom cores, and a user's module runs as a core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .core import Core, HypernetworkCore, NoiseEmbedding, without_autocast
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


CoreFactory = Callable[[Any, int], nn.Module]
"""(the NaraConfig, r) → a module λ (b,) → C (b, r, r)."""


def register_core(name: str, factory: CoreFactory) -> None:
    """Let `NaraConfig(core_type=name)` make its core with `factory(config, rank)`.

        register_core("mine", MyCore)

    The factory, a class or a function, returns a module. Each forward calls the module once as
    `core(noise_level)`, with λ (b,) float32 in [0, 1]. The module returns C (b, r, r), or (1, r, r)
    for all samples. If the module has an attribute `needs_noise = False`, it is called without
    arguments, and the adapter runs without λ. The module's parameters are trained, saved and loaded
    with the adapter, in float32. A layer of smaller rank r' reads C[:r', :r'].

    An adapter is saved with the name of its core, but without its code. Register the core in each
    program before you make or load such an adapter. The factory is also called under
    `torch.device("meta")`, so it must not read the values of tensors. Build the core from
    `nn.Parameter`s and `nara_diffusion.cores.core.Dense`, since quantisers, casters and
    `target_modules="all-linear"` change layers such as `nn.Linear`. Registering a name again
    replaces its factory.

    Raises:
        ValueError: `name` is empty or names a built-in core.
    """
    if not isinstance(name, str) or not name or name in BUILT_IN:
        raise ValueError(
            f"name is {name!r}: choose a text other than {', '.join(map(repr, BUILT_IN))}."
        )
    CUSTOM[name] = lambda config, rank: CustomCore(factory(config, rank), rank, name)


class CustomCore(Core):
    """A core from a registered factory, which runs in float32 and checks the shape of its C."""

    def __init__(self, core: object, rank: int, name: str) -> None:
        super().__init__(rank)
        if not isinstance(core, nn.Module):
            raise ValueError(
                f"The factory of core_type {name!r} returned {type(core).__name__}: return a torch.nn.Module that maps "
                "λ (b,) to C (b, r, r)."
            )
        self.core = core.float()
        self.name = name
        self.needs_noise = bool(getattr(core, "needs_noise", True))

    def forward(self, *noise_level: Tensor) -> Tensor:
        """Return C − I (b or 1, r, r), float32, for λ (b,), or without λ if the core ignores it."""
        default = noise_level[0].device if noise_level else torch.device("cpu")
        with without_autocast(self._device(default)):
            C = self.core(*(level.float() for level in noise_level))
        batches = (1, *map(len, noise_level))
        shape = tuple(C.shape) if isinstance(C, Tensor) else type(C).__name__
        if shape not in [(batch, self.rank, self.rank) for batch in batches]:
            raise ValueError(
                f"The core of core_type {self.name!r} returned {shape} for {batches[-1]} value(s) of λ and rank "
                f"{self.rank}: return C ({batches[-1]}, {self.rank}, {self.rank}), or (1, {self.rank}, {self.rank})."
            )
        return C.float() - torch.eye(self.rank, dtype=torch.float32, device=C.device)


def rebuild_core(core: CustomCore, config: CoreConfig) -> Core:
    """Return a core for another configuration that shares its tensors with `core`."""
    device = next((tensor.device for tensor in (*core.parameters(), *core.buffers())), None)
    rebuilt = build_core(config, core.rank)
    rebuilt.load_state_dict(core.state_dict(keep_vars=True), assign=True)
    return rebuilt.to(device).train(core.training)
