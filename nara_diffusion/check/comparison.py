"""How much lower NaRA's held-out loss is than another arm's, by bins of λ and as the mean over the bins.

    d_k = mean over bins of λ of  (ℓ − ℓ') / max(ℓ, ℓ')        in repeat k

ℓ is NaRA's mean loss on the held-out samples in a bin, ℓ' the other arm's. d lies between −1 and 1, so that one
training that fails doesn't decide the result. All bins count alike, since losses differ by orders of magnitude: an
ε-model's loss at much noise is a hundredth of that at little noise.
The 95 % interval over the repeats (Student's t) covers the differences between trainings and those between samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from nara_diffusion.utils.statistics import Interval, interval

from .trial import Repeat

BINS = 10  # equal parts of [0, 1], where λ is
ROUNDING = 1e-10  # losses up to this are float32 rounding


class BinLosses(NamedTuple):
    """The bin of λ from `low` to `high`: {arm: mean loss}, and NaRA's relative difference from LoRA."""

    low: float
    high: float
    losses: dict[str, float]
    difference: Interval


def relative_difference(repeats: Sequence[Repeat], other: str) -> Interval:
    """The mean and the interval of d from the arm `other`; see the module's docstring."""
    return interval([fmean(_difference(each, other) for each in _bins(repeat).values()) for repeat in repeats])


def mean_losses(repeats: Sequence[Repeat]) -> dict[str, float]:
    """{arm: its loss}, over all held-out samples."""
    return _means([repeat.losses for repeat in repeats])


def learnt_losses(repeats: Sequence[Repeat]) -> dict[str, float]:
    """{arm: its loss}, over the samples for which something is to be learnt: those for which the base isn't held.

    No arm can be better than the base where that is held, so that these samples would hide what the others learn.
    """
    return _means([_free(repeat) for repeat in repeats])


def by_bins(repeats: Sequence[Repeat]) -> list[BinLosses]:
    """The losses of each bin of λ that has samples."""
    found = [_bins(repeat) for repeat in repeats]
    rows = []
    for number in range(BINS):
        inside = [bins[number] for bins in found if number in bins]
        if inside:
            difference = interval([_difference(losses, "lora") for losses in inside])
            rows.append(BinLosses(number / BINS, (number + 1) / BINS, _means(inside), difference))
    return rows


def _free(repeat: Repeat) -> dict[str, Tensor]:
    if repeat.held is None or repeat.held.all():
        return repeat.losses
    return {arm: losses[~repeat.held] for arm, losses in repeat.losses.items()}


def _means(repeats: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    return {arm: fmean(losses[arm].mean().item() for losses in repeats) for arm in repeats[0]}


def _bins(repeat: Repeat) -> dict[int, dict[str, Tensor]]:
    """{index of the bin: {arm: losses}} of the bins that have samples."""
    numbers = (repeat.noise_level * BINS).long().clamp(0, BINS - 1)
    return {n: {arm: own[numbers == n] for arm, own in repeat.losses.items()} for n in numbers.unique().tolist()}


def _difference(losses: dict[str, Tensor], other: str) -> float:
    """NaRA's relative difference in a bin; 0 where the losses are no more than rounding."""
    nara, against = losses["nara"].mean().item(), losses[other].mean().item()
    larger = max(nara, against)
    return (nara - against) / larger if larger > ROUNDING else 0.0
