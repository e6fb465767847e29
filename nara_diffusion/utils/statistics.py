"""Mean, standard deviation and 95 % interval of a few values, such as one figure of several
training seeds.

With n values of mean m and sample deviation s (n − 1 in the denominator), the interval is m ± t · s
/ √n, where t is the 0.975 quantile of Student's t with n − 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """`low` and `high` bound the 95 % interval. A single value has a mean, and nan for the other
    three."""

    mean: float
    std: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return mean, sample standard deviation, and the interval that contains the true mean with 95
    % confidence."""
    from scipy.special import stdtrit

    mean, n = fmean(values), len(values)
    std = stdev(values) if n > 1 else math.nan
    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return Interval(mean, std, mean - half, mean + half)
