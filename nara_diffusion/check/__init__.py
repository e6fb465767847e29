"""nara-check: short trainings that measure whether an adapter gains by knowing the noise level λ (docs/check.md)."""

from .trials import CheckTask, Repeat, published, trials
from .verdict import THRESHOLDS, Verdict, decide, judge

__all__ = ["THRESHOLDS", "CheckTask", "Repeat", "Verdict", "decide", "judge", "published", "trials"]
