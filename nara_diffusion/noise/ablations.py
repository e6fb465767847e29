"""Ablations: the same adapter without its λ, to measure what λ is worth.

    with mean_core(model, torch.linspace(0, 1, 101)): …         C(λ) replaced by its mean over a grid of λ
    with changed_noise(model, constant_noise(0.5)): …           cores read one λ whatever the noise is
    with changed_noise(model, shuffled_noise(generator)): …     … the λ of another sample of the batch
    with changed_noise(model, reversed_noise): …                … 1 − λ

They are hooks on the cores, in evaluation and in training, and change what those read or return, not the model's inputs
(masks, noise). Contexts nest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .level import core_holders
from .signals import NoiseSignals, as_signals

Change = Callable[[NoiseSignals], NoiseSignals]
"""From the signals of a batch, λ (b,) or (1,) and the mask density or None, to those that cores read, as many."""


def mean_core(
    model: nn.Module,
    noise_levels: Tensor | Sequence[float],
    *,
    mask_density: Tensor | Sequence[float] | None = None,
) -> AbstractContextManager[None]:
    """Inside, every core of `model` is its mean over `noise_levels`. (λ has to be known, and changes nothing.)

    The mean is taken at each forward, from the parameters as they are then, and has their gradients.

    Args:
        noise_levels: (n,) in [0, 1].
        mask_density: (n,) beside them, for `core_input` "mask_density" or "both".

    Raises:
        ValueError: a value is out of range; `model` has no NaRA adapter.
    """
    grid = as_signals(noise_levels, mask_density)

    def mean(core: Any, args: Any, output: Tensor) -> Tensor:
        return core.forward(*_beside(grid, output)).mean(0, keepdim=True)

    return _hooked(model, lambda core: core.register_forward_hook(mean))


def changed_noise(model: nn.Module, change: Change) -> AbstractContextManager[None]:
    """Inside, the cores of `model` read `change(signals)`: see `constant_noise`, `shuffled_noise`, `reversed_noise`.

    Raises:
        ValueError: `model` has no NaRA adapter.
    """

    def changed(core: Any, args: Any) -> tuple[Tensor | None, ...]:
        return tuple(change(NoiseSignals(*args)))

    return _hooked(model, lambda core: core.register_forward_pre_hook(changed))


def constant_noise(level: float) -> Change:
    """λ, and the mask density, are `level` for every sample.

    Raises:
        ValueError: `level` is not in [0, 1].
    """
    value = as_signals(level).noise_level

    def change(signals: NoiseSignals) -> NoiseSignals:
        return _map(signals, lambda signal: value.to(signal.device).expand_as(signal))

    return change


def shuffled_noise(generator: torch.Generator | None = None) -> Change:
    """Each sample has the signals of another one of its batch, by a random permutation for each forward."""

    def change(signals: NoiseSignals) -> NoiseSignals:
        order = torch.randperm(len(signals.noise_level), generator=generator)
        return _map(signals, lambda signal: signal[order.to(signal.device)])

    return change


def reversed_noise(signals: NoiseSignals) -> NoiseSignals:
    """1 − λ, and one minus the mask density."""
    return _map(signals, lambda signal: 1 - signal)


def _beside(signals: NoiseSignals, like: Tensor) -> NoiseSignals:
    return _map(signals, lambda signal: signal.to(like.device))


def _map(signals: NoiseSignals, function: Callable[[Tensor], Tensor]) -> NoiseSignals:
    return NoiseSignals(*(None if signal is None else function(signal) for signal in signals))  # type: ignore[arg-type]


@contextmanager
def _hooked(model: nn.Module, register: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, `register` has put a hook on each core that reads λ."""
    cores = [core for holder in core_holders(model) for group in holder.cores.values() for core in group.values()]
    handles = [register(core) for core in cores if core.needs_noise]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
