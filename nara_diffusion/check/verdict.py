"""Is λ likely to pay? The thresholds, and the rules that read them, in order.

The thresholds are preliminary: they separate the trainings of which docs/check.md tells, where the outcome was known
beforehand, and wait for the benchmark of regimes to confirm them. R² is no part of the rules: the same layers, with the
same R², gain by λ in one training and not in another. What λ tells beyond a layer's own input is in the conflict: it is
measured after a static LoRA has used that input.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nara_diffusion.check.measurement import Findings


@dataclass(frozen=True)
class Thresholds:
    """Attributes:
    likely: conflict ratio from which on λ is likely to pay.
    unlikely: conflict ratio up to which it is unlikely.
    reliability: least share of gradient in what is measured before the fit.
    risen: loss after the fit over that before it, above which the fit has failed.
    fitted: the common gradient's energy that a fit may leave, over that before it.
    """

    likely: float = 0.3
    unlikely: float = 0.1
    reliability: float = 0.05
    risen: float = 1.2
    fitted: float = 0.5


THRESHOLDS = Thresholds()

LIKELY, UNLIKELY, UNKNOWN = "λ is likely to pay", "λ is unlikely to pay", "can't say"


@dataclass(frozen=True)
class Verdict:
    """Attributes: `answer`: LIKELY, UNLIKELY or UNKNOWN; `reason`: what it rests on, and what to do if unknown."""

    answer: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.answer, "reason": self.reason, "thresholds": asdict(THRESHOLDS)}


def judge(findings: Findings, thresholds: Thresholds = THRESHOLDS) -> Verdict:
    """The verdict; the first rule that holds."""
    ratio, reliability = findings.conflict_ratio, findings.before.reliability
    if math.isnan(ratio) or reliability < thresholds.reliability:
        return Verdict(
            UNKNOWN,
            f"the gradients don't show above the noise of the samples (reliability {reliability:.2f}, "
            f"{thresholds.reliability:g} needed): measure more samples.",
        )
    if findings.loss_after > thresholds.risen * findings.loss_before:
        return Verdict(
            UNKNOWN,
            f"the loss rose from {findings.loss_before:.4g} to {findings.loss_after:.4g} in the fit of the static "
            "LoRA: lower the learning rate.",
        )
    conflict = f"after the fit, the bins' gradients against each other have {ratio:.3g} of the energy before it"
    if ratio >= thresholds.likely:
        return Verdict(LIKELY, f"{conflict} ({thresholds.likely:g} or more): no static update serves all λ.")
    left = findings.after.common / findings.before.common if findings.before.common > 0 else math.inf
    if left > thresholds.fitted:
        return Verdict(
            UNKNOWN,
            f"the fit of the static LoRA left {left:.2f} of the gradient that all λ share ({thresholds.fitted:g} at "
            "most): raise the learning rate, or the steps of the fit.",
        )
    if ratio <= thresholds.unlikely:
        return Verdict(UNLIKELY, f"{conflict} ({thresholds.unlikely:g} or less): a static update serves all λ.")
    return Verdict(UNKNOWN, f"{conflict}, between {thresholds.unlikely:g} and {thresholds.likely:g}: try both.")
