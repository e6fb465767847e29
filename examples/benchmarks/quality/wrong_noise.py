"""Ablations: wrong λ on purpose. What is left of an adapter's gain then doesn't come from knowing the noise.

constant   trained and evaluated with λ = 0.5
shuffled   trained with the λ of other samples, evaluated with the true one
reversed   the trained adapter, evaluated with 1 − λ
mean_core  the trained adapter, evaluated with the mean of C(λ) over a grid of λ

They hook the cores, in evaluation and in training: the model's inputs (masks, noise) stay as they are. Leave a context
before another core is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.cores.core import Core

EVALUATED = ("mean_core", "reversed")
"""Ablations of the trained adapter."""
GRID = (torch.arange(100) + 0.5) / 100
Change = Callable[[Tensor], Tensor]
"""From λ (b,) of a batch to what cores read in its place."""


def cores_of(model: nn.Module) -> list[Core]:
    """The cores of `model` that read λ; a core inside of another one is a part of it."""
    cores: dict[str, Core] = {}
    for name, module in model.named_modules():
        if isinstance(module, Core) and module.needs_noise and not any(name.startswith(f"{core}.") for core in cores):
            cores[name] = module
    return list(cores.values())


@contextmanager
def changed_noise(model: nn.Module, change: Change) -> Iterator[None]:
    """Inside, the cores of `model` read `change(λ)`: see `constant_noise`."""

    def replace(core: nn.Module, levels: tuple[Tensor]) -> tuple[Tensor]:
        return (change(levels[0]),)

    handles = [core.register_forward_pre_hook(replace) for core in cores_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def mean_core(model: nn.Module, noise_levels: Tensor) -> Iterator[None]:
    """Inside, every core of `model` is its mean over `noise_levels` (n,).

    The mean is taken at each forward, from the parameters as they are then, and has their gradients.
    """

    def average(core: nn.Module, signals: Any, matrices: Tensor) -> Tensor:
        return matrices.mean(0, keepdim=True)  # (1, r, r)

    handles = [core.register_forward_hook(average) for core in cores_of(model)]
    try:
        with changed_noise(model, lambda level: noise_levels.to(level)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def constant_noise(level: Tensor) -> Tensor:
    """λ is 0.5 for every sample."""
    return torch.full_like(level, 0.5)


def exchanged_noise(generator: torch.Generator) -> Change:
    """Each sample has the λ of another one than itself, by a random cycle through the batch for each core's call."""

    def change(level: Tensor) -> Tensor:
        cycle = torch.randperm(len(level), generator=generator)
        result = torch.empty_like(level)
        result[cycle] = level[cycle.roll(1)]
        return result

    return change


def training_change(control: str | None, seed: int) -> Change | None:
    """What cores read in a training of language models under a control; None where they read the true λ."""
    changes = {"constant": constant_noise, "shuffled": exchanged_noise(torch.Generator().manual_seed(seed))}
    return None if control is None else changes[control]


def while_evaluating(model: nn.Module, control: str | None, grid: Tensor = GRID) -> AbstractContextManager[None]:
    """Inside, the cores of `model` are what a control makes of them in evaluation; of "shuffled", as they are."""
    changes: dict[str | None, Change] = {"constant": constant_noise, "reversed": lambda level: 1 - level}
    if control == "mean_core":
        return mean_core(model, grid)
    return changed_noise(model, changes[control]) if control in changes else nullcontext()
