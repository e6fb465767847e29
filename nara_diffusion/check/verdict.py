"""Is λ likely to pay? The relative differences of held-out losses, and rules in their order (docs/check.md).

    d_k = mean over bins of λ of  (ℓ − ℓ') / max(ℓ, ℓ')        in repeat k

ℓ is NaRA's mean loss on the held-out samples in a bin, ℓ' another arm's. d lies between −1 and 1, so that one training
that fails doesn't decide the result. All bins count alike, since losses differ by orders of magnitude: an ε-model's
loss at much noise is a hundredth of that at little noise. The 95 % interval over the repeats (Student's t) covers the
differences between trainings and those between samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from nara_diffusion.utils.statistics import Interval, interval

from .trials import ARMS, CheckSettings, CheckTask, Repeat, trials

BINS = 10  # equal parts of [0, 1], where λ is
ROUNDING = 1e-10  # losses up to this are float32 rounding
LIKELY, UNLIKELY, UNKNOWN = "λ is likely to pay", "λ is unlikely to pay", "can't say"
CHEAPER = (
    "NaRA isn't the only way of telling λ: try first, since this check doesn't, LoRA or DoRA on the time layers too, "
    "λ as a token of the prompt, or for a conversion the base as it is, read in the other form (docs/conversion.md)."
)


@dataclass(frozen=True)
class Thresholds:
    """Attributes:
    pays: the relative gain of NaRA's loss from which on λ pays.
    nothing: the largest mean gain at which λ is said not to pay; a larger gain may grow with more steps.
    learnt: the relative gain of the lowest loss over the base model's that the trainings need to show anything.
    fewest: the least number of repeats for a verdict.
    """

    pays: float = 0.02
    nothing: float = 0.005
    learnt: float = 0.02
    fewest: int = 3


THRESHOLDS = Thresholds()
"""The default thresholds of `judge`."""


@dataclass(frozen=True)
class Verdict:
    """Attributes: `answer`: LIKELY, UNLIKELY or UNKNOWN; `reason`: the numbers, and what to do if it is UNKNOWN."""

    answer: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.answer, "reason": self.reason, "thresholds": asdict(THRESHOLDS)}


def decide(task: CheckTask, settings: CheckSettings, progress: bool) -> tuple[list[Repeat], Verdict]:
    """Repeat the short trainings until the verdict is clear, or `settings.repeats` times.

    Raises:
        ValueError: see `trials`.
    """
    repeats: list[Repeat] = []
    for repeat in trials(task, settings, progress):
        repeats.append(repeat)
        if len(repeats) >= THRESHOLDS.fewest and (verdict := judge(repeats)).answer != UNKNOWN:
            return repeats, verdict
    return repeats, judge(repeats)


def judge(repeats: Sequence[Repeat], thresholds: Thresholds = THRESHOLDS) -> Verdict:
    """The verdict of the first rule that applies."""
    losses, pays = mean_losses(repeats), _percent(-thresholds.pays)
    change = min(losses[arm] for arm in ARMS) / losses["base"] - 1
    if change > -thresholds.learnt:
        return Verdict(
            UNKNOWN,
            f"the lowest loss differs from the base model's by {_percent(change)}, and {_percent(-thresholds.learnt)} "
            "is needed to show anything: raise the learning rate or the steps, or lower the rate if the loss rose.",
        )
    lora, untold = differences = [relative_difference(repeats, other) for other in ("lora", "untold")]
    found = f"NaRA's held-out loss differs from LoRA's by {described(lora)} and from that of NaRA without λ by "
    found += f"{described(untold)}, in {len(repeats)} repeats"
    is_lower = all(difference.high < 0 for difference in differences)
    if is_lower and all(difference.mean <= -thresholds.pays for difference in differences):
        return Verdict(LIKELY, f"{found}: both intervals are below zero, and both means are {pays} or lower. {CHEAPER}")
    if is_lower:
        more = "take more steps, with which the gain may grow"
        return Verdict(UNKNOWN, f"{found}: both intervals are below zero, but not both means are {pays}: {more}.")
    if any(_is_nothing(difference, thresholds) for difference in differences):
        return Verdict(UNLIKELY, f"{found}: one interval is above {pays} and not below zero.")
    return Verdict(UNKNOWN, f"{found}: the intervals allow both {pays} and no gain: take more repeats.")


def _is_nothing(difference: Interval, thresholds: Thresholds) -> bool:
    """Whether the interval excludes a gain that pays and includes none, and the mean shows no gain that may grow."""
    is_small = difference.low > -thresholds.pays and difference.mean > -thresholds.nothing
    return is_small and difference.high >= 0


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


def by_bins(repeats: Sequence[Repeat]) -> list[BinLosses]:
    """The losses of each bin of λ that has samples."""
    found, rows = [_bins(repeat) for repeat in repeats], []
    for number in range(BINS):
        if inside := [bins[number] for bins in found if number in bins]:
            difference = interval([_difference(losses, "lora") for losses in inside])
            rows.append(BinLosses(number / BINS, (number + 1) / BINS, _means(inside), difference))
    return rows


def described(difference: Interval) -> str:
    """A relative difference and its 95 % interval, if it has one."""
    if math.isnan(difference.low):
        return _percent(difference.mean)
    return f"{_percent(difference.mean)} ({_percent(difference.low)} to {_percent(difference.high)})"


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


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")
