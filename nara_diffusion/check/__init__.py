"""Run short trainings to measure whether λ helps an adapter (`nara-check`, docs/check.md)."""

from .trials import CheckTask, Repeat, published, trials
from .verdict import THRESHOLDS, Verdict, decide, judge

__all__ = ["THRESHOLDS", "CheckTask", "Repeat", "Verdict", "decide", "judge", "published", "trials"]
