"""Short trainings that measure what λ is worth to an adapter (`nara-check`, docs/check.md)."""

from .trials import CheckTask, Repeat, published, trials
from .verdict import THRESHOLDS, Verdict, decide, judge

__all__ = ["THRESHOLDS", "CheckTask", "Repeat", "Verdict", "decide", "judge", "published", "trials"]
