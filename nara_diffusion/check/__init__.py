"""Whether knowing λ can help an adapter, measured before training; docs/check.md."""

from nara_diffusion.check.run import decide
from nara_diffusion.check.trial import CheckSettings, CheckTask, Repeat, published, trials
from nara_diffusion.check.verdict import THRESHOLDS, Thresholds, Verdict, judge

__all__ = [
    "THRESHOLDS",
    "CheckSettings",
    "CheckTask",
    "Repeat",
    "Thresholds",
    "Verdict",
    "decide",
    "judge",
    "published",
    "trials",
]
