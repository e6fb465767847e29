"""Compute the mean, standard deviation and 95 % interval of a few values, such as one per seed.

With n values of mean m and sample deviation s (n − 1 in the denominator), the interval is
m ± t · s / √n, where t is the 0.975 quantile of Student's t with n − 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """The mean, the deviation and the 95 % interval from `low` to `high`; NaN if undefined."""

    mean: float
    std: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return the mean, the sample standard deviation, and the mean's 95 % confidence interval."""
    from scipy.special import stdtrit

    mean, n = fmean(values), len(values)
    std = stdev(values) if n > 1 else math.nan
    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return Interval(mean, std, mean - half, mean + half)
