"""Custom cores: `register_core("mine", factory)`, then `NaraConfig(core_type="mine")` like any built-in type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .float32 import Float32Module

CoreFactory = Callable[[Any, int], nn.Module]
"""(the NaraConfig, r) → a module λ (b,) → C (b, r, r)."""

BUILT_IN = ("hypernetwork", "constant", "identity", "rank_mask", "bins", "knots")
_factories: dict[str, CoreFactory] = {}


def register_core(name: str, factory: CoreFactory) -> None:
    """Let `NaraConfig(core_type=name)` make its core by `factory(config, rank)`: a class, or a function.

        register_core("mine", MyCore)

    The factory returns a module. Each forward calls it once as `core(noise_level)`, with λ (b,) float32 in [0, 1], and
    it returns C (b, r, r), or (1, r, r) for all samples. Two attributes change that: with `needs_noise = False` it is
    called without arguments, and the adapter runs without λ; with `needs_density = True` it is called as
    `core(noise_level, mask_density)`. Its parameters are trained, saved and loaded with the adapter, in float32. A
    layer of smaller rank r' reads C[:r', :r'].

    An adapter is saved with the name, not with the code: register the core in each program, before you make or load
    such an adapter. The factory is also called under `torch.device("meta")`, so that it must not read values of
    tensors. Build the core of `nn.Parameter`s and `nara_diffusion.cores.float32.Dense`, since quantisers, casters and
    `target_modules="all-linear"` change layers such as `nn.Linear`. Registering a name again replaces its factory.

    Raises:
        ValueError: `name` is empty or that of a built-in core, or `factory` cannot be called.
    """
    if not isinstance(name, str) or not name or name in BUILT_IN:
        raise ValueError(f"name is {name!r}: choose a text other than {', '.join(map(repr, BUILT_IN))}.")
    if not callable(factory):
        raise ValueError(f"factory is {factory!r}: pass a class or function (config, rank) → torch.nn.Module.")
    _factories[name] = factory


def check_core_type(name: Any) -> None:
    """Raises ValueError if there is no core of that name."""
    known = (*BUILT_IN, *_factories)
    if name not in known:
        raise ValueError(
            f"core_type is {name!r}: choose one of {', '.join(map(repr, known))}. If it is a custom core, first "
            f"import the module that calls nara_diffusion.register_core({name!r}, factory), as where the adapter was "
            "trained; the train scripts do by --core_module."
        )


def registered_cores() -> dict[str, CoreFactory]:
    """{name: factory} of the custom cores."""
    return dict(_factories)


def build_custom_core(config: Any, rank: int) -> CustomCore:
    """The core that is registered under the name `config.core_type`."""
    core = _factories[config.core_type](config, rank)
    if not isinstance(core, nn.Module):
        raise ValueError(
            f"The factory of core_type {config.core_type!r} returned {type(core).__name__}: return a torch.nn.Module "
            "that maps λ (b,) to C (b, r, r)."
        )
    return CustomCore(core, rank, config.core_type)


def rebuild_custom_core(core: CustomCore, config: Any) -> CustomCore:
    """`core` as its factory makes it from another configuration, with the tensors that it has: the same objects."""
    with torch.random.fork_rng(devices=[]):  # what is drawn at random is replaced at once
        rebuilt = build_custom_core(config, core.rank)
    trainable = [(parameter, parameter.requires_grad) for parameter in core.parameters()]
    rebuilt.load_state_dict(core.state_dict(keep_vars=True), assign=True)
    for parameter, requires_grad in trainable:
        parameter.requires_grad = requires_grad
    device = next((tensor.device for tensor in (*core.parameters(), *core.buffers())), None)
    return rebuilt.to(device).train(core.training)


class CustomCore(Float32Module):
    """A registered core in float32, with a check of the shape of its C.

    Args:
        core: what the factory has made. rank: r. name: of its type, for messages.
    """

    def __init__(self, core: nn.Module, rank: int, name: str) -> None:
        super().__init__()
        self.core = core.float()
        self.rank = rank
        self.name = name
        self.needs_noise = bool(getattr(core, "needs_noise", True))
        self.needs_density = self.needs_noise and bool(getattr(core, "needs_density", False))

    def forward(self, noise_level: Tensor | None = None, mask_density: Tensor | None = None) -> Tensor:
        """λ (b,), density (b,) or None → C (b or 1, r, r), float32.

        Raises:
            ValueError: the core returns another shape, or no tensor.
        """
        signals = (noise_level, mask_density) if self.needs_density else (noise_level,) if self.needs_noise else ()
        device = "cpu" if noise_level is None else noise_level.device.type
        with torch.autocast(device, enabled=False):
            found = self.core(*(None if signal is None else signal.float() for signal in signals))
        batches = (1,) if noise_level is None else (1, len(noise_level))
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape not in [(batch, self.rank, self.rank) for batch in batches]:
            raise ValueError(
                f"The core of core_type {self.name!r} returned {shape} for {batches[-1]} value(s) of λ and rank "
                f"{self.rank}: return C ({batches[-1]}, {self.rank}, {self.rank}), or (1, {self.rank}, {self.rank})."
            )
        return found.float()
