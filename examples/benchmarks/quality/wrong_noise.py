"""Ablations: the same adapter without its λ, by hooks on its cores, to measure what λ is worth.

    with changed_noise(model, constant_noise(0.5)): …     cores read one λ whatever the noise is
    with changed_noise(model, reversed_noise): …          … 1 − λ
    with mean_core(model, grid): …                        C(λ) is replaced by its mean over a grid of λ

They work in evaluation and in training. The model's inputs (masks, noise) and the λ that has to be known stay as they
are. Leave a context before another core is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.cores.float32 import Core

Change = Callable[[Tensor], Tensor]
"""From a signal of a batch, λ (b,) or the mask density (b,), to what cores read in its place."""


def cores_of(model: nn.Module) -> list[Core]:
    """The cores of `model` that read λ; a core inside of another one is a part of it."""
    found: dict[str, Core] = {}
    for name, module in model.named_modules():
        if isinstance(module, Core) and module.needs_noise and not any(name.startswith(f"{core}.") for core in found):
            found[name] = module
    return list(found.values())


@contextmanager
def changed_noise(model: nn.Module, change: Change) -> Iterator[None]:
    """Inside, the cores of `model` read `change(λ)` and `change(density)`: see `constant_noise`, `reversed_noise`."""

    def replace(core: nn.Module, signals: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(None if signal is None else change(signal) for signal in signals)

    handles = [core.register_forward_pre_hook(replace) for core in cores_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def mean_core(model: nn.Module, noise_levels: Tensor) -> Iterator[None]:
    """Inside, every core of `model` is its mean over `noise_levels` (n,), which a mask density goes along with.

    The mean is taken at each forward, from the parameters as they are then, and has their gradients.
    """

    def average(core: nn.Module, signals: Any, matrices: Tensor) -> Tensor:
        return matrices.mean(0, keepdim=True)  # (1, r, r)

    handles = [core.register_forward_hook(average) for core in cores_of(model)]
    try:
        with changed_noise(model, lambda signal: noise_levels.to(signal)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def constant_noise(level: float) -> Change:
    """λ, and the mask density, are `level` for every sample."""
    return lambda signal: torch.full_like(signal, level)


def reversed_noise(signal: Tensor) -> Tensor:
    """1 − λ, and one minus the mask density."""
    return 1 - signal
