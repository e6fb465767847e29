"""Whether knowing λ can help an adapter, measured before training; docs/check.md."""

from .run import decide
from .trial import CheckSettings, CheckTask, Repeat, published, trials
from .verdict import THRESHOLDS, Thresholds, Verdict, judge

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
