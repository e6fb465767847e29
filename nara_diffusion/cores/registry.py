"""Name → type of core, `register_core` for custom cores, and the cores of one adapter."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .float32 import Core, without_autocast
from .hypernetwork import CoreInit, HypernetworkCore, NoiseEmbedding
from .simple import BinsCore, ConstantCore, IdentityCore, KnotsCore, RankMaskCore


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


CoreFactory = Callable[[Any, int], nn.Module]
"""(the NaraConfig, r) → a module λ (b,) → C (b, r, r)."""

_BUILT_IN: dict[str, CoreFactory] = {
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
_custom: dict[str, CoreFactory] = {}


def register_core(name: str, factory: CoreFactory) -> None:
    """Let `NaraConfig(core_type=name)` make its core with `factory(config, rank)`.

        register_core("mine", MyCore)

    The factory, a class or a function, returns a module. Each forward calls the module once as
    `core(noise_level)`, with λ (b,) float32 in [0, 1]. The module returns C (b, r, r), or (1, r, r)
    for all samples. If it has an attribute `needs_noise = False`, it is called without arguments,
    and the adapter runs without λ. Its parameters are trained, saved and loaded with the adapter,
    in float32. A layer of smaller rank r' reads C[:r', :r'].

    An adapter is saved with the name of its core, not with the code: register the core in each
    program before you make or load such an adapter. The factory is also called under
    `torch.device("meta")`, so it must not read values of tensors. Build the core from
    `nn.Parameter`s and `nara_diffusion.cores.float32.Dense`, since quantisers, casters and
    `target_modules="all-linear"` change layers such as `nn.Linear`. Registering a name again
    replaces its factory.

    Raises:
        ValueError: `name` is empty or that of a built-in core, or `factory` is not callable.
    """
    if not isinstance(name, str) or not name or name in BUILT_IN:
        raise ValueError(
            f"name is {name!r}: choose a text other than {', '.join(map(repr, BUILT_IN))}."
        )
    if not callable(factory):
        raise ValueError(
            f"factory is {factory!r}: pass a class or function (config, rank) → torch.nn.Module."
        )
    _custom[name] = factory


def check_core_type(name: object) -> None:
    """Raise ValueError if there is no core type of that name."""
    known = (*BUILT_IN, *_custom)
    if name not in known:
        raise ValueError(
            f"core_type is {name!r}: choose one of {', '.join(map(repr, known))}. If it is a custom core, first "
            f"import the module that calls nara_diffusion.register_core({name!r}, factory), as in the adapter's "
            "training; in the train scripts, --core_module does this."
        )


def registered_cores() -> dict[str, CoreFactory]:
    """Return name → factory of the custom cores."""
    return dict(_custom)


def build_core(config: CoreConfig, rank: int) -> Core:
    """Return the core that a NaraConfig describes, for layers of rank up to `rank`."""
    if config.core_type in _custom:
        return CustomCore(_custom[config.core_type](config, rank), rank, config.core_type)
    return _BUILT_IN[config.core_type](config, rank)  # type: ignore[return-value]


def needs_noise(config: CoreConfig) -> bool:
    """Return True if the core or the strength of this NaraConfig depends on λ."""
    with torch.device("meta"):
        return config.strength is not None or build_core(config, config.r).needs_noise


class CustomCore(Core):
    """A core made by a registered factory. It runs in float32, and checks the shape of its C."""

    def __init__(self, core: Any, rank: int, name: str) -> None:
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
        """Return C − I (b or 1, r, r), float32, for λ (b,), or for no argument if λ is not read."""
        default = noise_level[0].device if noise_level else torch.device("cpu")
        with without_autocast(self._device(default)):
            found = self.core(*(level.float() for level in noise_level))
        batches = (1, *map(len, noise_level))
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape not in [(batch, self.rank, self.rank) for batch in batches]:
            raise ValueError(
                f"The core of core_type {self.name!r} returned {shape} for {batches[-1]} value(s) of λ and rank "
                f"{self.rank}: return C ({batches[-1]}, {self.rank}, {self.rank}), or (1, {self.rank}, {self.rank})."
            )
        found = found.float()
        return found - torch.eye(self.rank, dtype=torch.float32, device=found.device)


def rebuild_core(core: CustomCore, config: CoreConfig) -> Core:
    """Return a new core from another configuration that shares the tensors of `core`."""
    device = next((tensor.device for tensor in (*core.parameters(), *core.buffers())), None)
    rebuilt = build_core(config, core.rank)
    rebuilt.load_state_dict(core.state_dict(keep_vars=True), assign=True)
    return rebuilt.to(device).train(core.training)


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
    """Group of layers → its core; made by `make_cores`."""

    @property
    def needs_noise(self) -> bool:
        return any(bool(core.needs_noise) for core in self.values())

    def deviation(self, group: str, noise_level: Tensor | None) -> Tensor:
        """Return D = C − I (b or 1, r, r), float32, of one group at λ (b,).

        A core without noise input ignores λ.
        """
        return self[group].at(noise_level)  # type: ignore[operator]

    def matrix(self, group: str, noise_level: Tensor | None) -> Tensor:
        """Return C = I + D (b or 1, r, r), float32, of one group at λ (b,)."""
        D = self.deviation(group, noise_level)
        return torch.eye(D.shape[-1], dtype=D.dtype, device=D.device) + D


def make_cores(config: CoreConfig, ranks: dict[str, int]) -> CoreSet:
    """Return the cores that a NaraConfig describes.

    Args:
        ranks: group → the largest rank among its layers.
    """
    return CoreSet({group: build_core(config, rank) for group, rank in ranks.items()})


def core_group(config: CoreConfig, module_name: str, rank: int) -> str:
    """Return the name of the core that an adapted module of this rank reads.

    `core_sharing` gives one core to all modules, to all modules of one name, or to each module. All
    modules of one rank share a core that has no parameters but depends on the rank.
    """
    if config.core_type in ("rank_mask", "bins"):
        return f"rank-{rank}"
    if config.core_sharing == "global":
        return SHARED
    if config.core_sharing == "module_type":
        group = re.sub(r"(\.\d+)+$", "", module_name).rpartition(".")[2]  # to_out.0 → to_out
    else:
        group = module_name.replace(".", "-")
    # attributes of `nn.ModuleDict`; "at" and "groups" once were, and files have them with "_"
    taken = hasattr(CoreSet, group) or keyword.iskeyword(group) or group in ("at", "groups")
    return f"{group}_" if taken else group


def with_current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `tensors` of a file, with the shared core's current name.

    Its name was `nara_core.global`.
    """
    return {
        key.replace("nara_core.global.", f"{NAME_IN_FILES}.{SHARED}."): tensor
        for key, tensor in tensors.items()
    }
