"""Whether knowing λ can help an adapter, measured before training; docs/check.md."""

from nara_diffusion.check.comparison import BinComparison, compare_bins
from nara_diffusion.check.measurement import Batch, CheckSettings, CheckTask, Findings, measure
from nara_diffusion.check.probe import Forward, probe
from nara_diffusion.check.verdict import THRESHOLDS, Thresholds, Verdict, judge

__all__ = [
    "THRESHOLDS",
    "Batch",
    "BinComparison",
    "CheckSettings",
    "CheckTask",
    "Findings",
    "Forward",
    "Thresholds",
    "Verdict",
    "compare_bins",
    "judge",
    "measure",
    "probe",
]
