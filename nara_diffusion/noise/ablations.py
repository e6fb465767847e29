"""Ablations: the same adapter without its λ, to measure what λ is worth.

    with mean_core(model, torch.linspace(0, 1, 101)): …         C(λ) replaced by its mean over a grid of λ
    with changed_noise(model, constant_noise(0.5)): …           cores read one λ whatever the noise is
    with changed_noise(model, shuffled_noise(generator)): …     … the λ of another sample of the batch
    with changed_noise(model, reversed_noise): …                … 1 − λ

They work in evaluation and in training, and take precedence over every other λ: that of `noise_level`, which a loss or
a sampler enters itself, and that of a source. They change neither the model's inputs (masks, noise) nor the result of
`core_matrix`. Contexts nest; the innermost one applies. A forward inside your own checkpoint function (not the model's)
runs again in backward: call backward inside the context too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nara_diffusion.runtime.channel import CoreChannel
from nara_diffusion.runtime.context_stack import entered, innermost
from nara_diffusion.runtime.modules import core_holders

from .signals import NoiseSignals, as_signals

Change = Callable[[NoiseSignals], NoiseSignals]
"""From the signals of a batch, λ (b,) or (1,) and the mask density or None, to those that cores read, as many."""


class Ablation(NamedTuple):
    """Exactly one of two: a grid of λ over which C is averaged, or a change of the signals that cores read."""

    grid: NoiseSignals | None = None
    change: Change | None = None


def mean_core(
    model: nn.Module,
    noise_levels: Tensor | Sequence[float],
    *,
    mask_density: Tensor | Sequence[float] | None = None,
) -> AbstractContextManager[None]:
    """Inside, every core of `model` is its mean over `noise_levels`; λ need not be known.

    The mean is taken at each forward, from the parameters as they are then, and has their gradients.

    Args:
        noise_levels: (n,) in [0, 1].
        mask_density: (n,) beside them, for `core_input` "mask_density" or "both".

    Raises:
        ValueError: a value is out of range; `model` has no NaRA adapter, or a merged one.
    """
    return _ablated(model, Ablation(grid=as_signals(noise_levels, mask_density)))


def changed_noise(model: nn.Module, change: Change) -> AbstractContextManager[None]:
    """Inside, the cores of `model` read `change(signals)`: see `constant_noise`, `shuffled_noise`, `reversed_noise`.

    Raises:
        ValueError: `model` has no NaRA adapter, or a merged one.
    """
    return _ablated(model, Ablation(change=change))


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


def _map(signals: NoiseSignals, function: Callable[[Tensor], Tensor]) -> NoiseSignals:
    return NoiseSignals(*(None if signal is None else function(signal) for signal in signals))  # type: ignore[arg-type]


@contextmanager
def _ablated(model: nn.Module, ablation: Ablation) -> Iterator[None]:
    holders = core_holders(model)
    merged = sorted({name for holder in holders for name in holder.merged_adapters})
    if merged:
        raise ValueError(
            f"Adapter(s) {', '.join(map(repr, merged))} are merged at one λ, which an ablation cannot change: call "
            "unmerge_adapter() first."
        )
    with entered(frozenset(holder.channel for holder in holders), ablation):
        yield


# ---------------------------------------------------------------------- for the holder of cores


def _ablation(channel: CoreChannel) -> Ablation:
    entry = innermost(channel, Ablation)
    return Ablation() if entry is None else entry.value


def grid_of(channel: CoreChannel) -> NoiseSignals | None:
    """The λ over which cores are averaged here and now, if they are."""
    return _ablation(channel).grid


def is_noise_changed(channel: CoreChannel) -> bool:
    """Whether `changed_noise` holds here and now."""
    return _ablation(channel).change is not None


def as_read(channel: CoreChannel, signals: NoiseSignals) -> NoiseSignals:
    """`signals` as cores are to read them here and now."""
    change = _ablation(channel).change
    if change is None:
        return signals
    changed = as_signals(*change(signals))
    if len(changed.noise_level) != len(signals.noise_level):
        raise ValueError(
            f"The change of noise returned {len(changed.noise_level)} values for {len(signals.noise_level)}: return "
            "as many as it is given."
        )
    return changed


def refuse_ablation(channel: CoreChannel) -> None:
    """Raises ValueError inside `mean_core` or `changed_noise`."""
    if innermost(channel, Ablation) is not None:
        raise ValueError("An adapter cannot be merged inside mean_core() or changed_noise(): merge outside of it.")
