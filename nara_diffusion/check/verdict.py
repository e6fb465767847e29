"""The verdict whether λ is likely to pay: thresholds, and rules in their order. docs/check.md has the reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nara_diffusion.utils.statistics import Interval

from .comparison import learnt_losses, relative_difference
from .trial import ARMS, Repeat


@dataclass(frozen=True)
class Thresholds:
    """Attributes:
    pays: the relative gain of NaRA's loss from which on λ pays.
    nothing: the largest mean gain at which λ is said not to pay; a larger gain may grow with more steps.
    learnt: the relative gain of the lowest loss over the base model's that the trainings need to show anything; where
        the base is held outside of a window, inside of it.
    fewest: the least number of repeats for a verdict.
    """

    pays: float = 0.02
    nothing: float = 0.005
    learnt: float = 0.02
    fewest: int = 3


THRESHOLDS = Thresholds()
"""The default thresholds of `judge`."""

MEASURED_STEPS = 100
"""The steps of the short trainings by which the rules are measured (docs/check.md)."""

LIKELY, UNLIKELY, UNKNOWN = "λ is likely to pay", "λ is unlikely to pay", "can't say"

CHEAPER = (
    "NaRA isn't the only way of telling λ: try first, since this check doesn't, LoRA or DoRA on the time layers too, "
    "λ as a token of the prompt, or for a conversion the base as it is, read in the other form (docs/conversion.md)."
)


@dataclass(frozen=True)
class Verdict:
    """Attributes: `answer`: LIKELY, UNLIKELY or UNKNOWN; `reason`: the numbers, and what to do if it is UNKNOWN."""

    answer: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.answer, "reason": self.reason, "thresholds": asdict(THRESHOLDS)}


def judge(repeats: Sequence[Repeat], thresholds: Thresholds = THRESHOLDS) -> Verdict:
    """The verdict of the first rule that applies."""
    losses, pays = learnt_losses(repeats), _percent(-thresholds.pays)
    change = min(losses[arm] for arm in ARMS) / losses["base"] - 1
    if change > -thresholds.learnt:
        return Verdict(
            UNKNOWN,
            f"the lowest loss differs from the base model's by {_percent(change)}, and {_percent(-thresholds.learnt)} "
            "is needed to show anything: raise the learning rate or the steps, or lower the rate if the loss rose.",
        )
    lora, untold = differences = [relative_difference(repeats, other) for other in ("lora", "untold")]
    told = f"NaRA's held-out loss differs from LoRA's by {described(lora)} and from that of NaRA without λ by "
    told += f"{described(untold)}, in {len(repeats)} repeats"
    is_lower = all(difference.high < 0 for difference in differences)
    if is_lower and all(difference.mean <= -thresholds.pays for difference in differences):
        return Verdict(LIKELY, f"{told}: both intervals are below zero, and both means are {pays} or lower. {CHEAPER}")
    if is_lower:
        return Verdict(
            UNKNOWN,
            f"{told}: both intervals are below zero, but not both means are {pays} or lower: take more steps, with "
            "which the gain may grow.",
        )
    if any(_is_nothing(difference, thresholds) for difference in differences):
        return Verdict(UNLIKELY, f"{told}: one interval is above {pays} and not below zero.")
    return Verdict(UNKNOWN, f"{told}: the intervals allow both {pays} and no gain: take more repeats.")


def after_steps(verdict: Verdict, steps: int) -> Verdict:
    """The verdict of trainings of so many steps: fewer than the rules were measured with leave "unlikely" open, since
    C(λ) starts at I, where NaRA is LoRA."""
    if verdict.answer != UNLIKELY or steps >= MEASURED_STEPS:
        return verdict
    few = f"{steps} steps are fewer than the {MEASURED_STEPS} that this rule is measured with, and C(λ) starts at I"
    return Verdict(UNKNOWN, f"{verdict.reason.rstrip('.')}; but {few}: take {MEASURED_STEPS}.")


def _is_nothing(difference: Interval, thresholds: Thresholds) -> bool:
    """Whether the interval excludes a gain that pays and includes none, and the mean shows no gain that may grow."""
    is_small = difference.low > -thresholds.pays and difference.mean > -thresholds.nothing
    return is_small and difference.high >= 0


def described(difference: Interval) -> str:
    """A relative difference and its 95 % interval, if it has one."""
    if math.isnan(difference.low):
        return _percent(difference.mean)
    return f"{_percent(difference.mean)} ({_percent(difference.low)} to {_percent(difference.high)})"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")
