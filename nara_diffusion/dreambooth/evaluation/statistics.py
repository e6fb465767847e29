"""Mean, standard deviation and 95 % interval of a few values, such as one figure of several training seeds.

With n values of mean m and sample deviation s (n − 1 in the denominator), the interval is m ± t · s / √n, where t is
the 0.975 quantile of Student's t with n − 1 degrees of freedom. SciPy has it, but isn't needed for one function: for
whole degrees of freedom ν the distribution has a closed form (Abramowitz & Stegun, 26.7.3 and 26.7.4). With
θ = atan(t / √ν),

    ν odd:   P(|T| < t) = 2/π · (θ + sin θ · (cos θ + 2/3 cos³θ + … + 2·4⋯(ν−3) / 3·5⋯(ν−2) · cos^(ν−2) θ))
    ν even:  P(|T| < t) = sin θ · (1 + 1/2 cos²θ + 1·3/2·4 cos⁴θ + … + 1·3⋯(ν−3) / 2·4⋯(ν−2) · cos^(ν−2) θ)

which grows with t, so that halving an interval finds the quantile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """`low` and `high` bound the 95 % interval; one value alone has a mean, and nan for the other three."""

    mean: float
    std: float
    low: float
    high: float


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean, sample standard deviation, and the interval that holds the true mean with `confidence`.

    Raises:
        ValueError: no value, one that isn't finite, or a confidence outside (0, 1).
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values are {list(values)}, expected one finite number or more")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, math.nan)
    std = stdev(values)
    half = student_t(confidence, len(values) - 1) * std / math.sqrt(len(values))
    return Interval(mean, std, mean - half, mean + half)


def student_t(confidence: float, degrees: int) -> float:
    """The t for which |T| < t with probability `confidence`, T of Student's distribution with `degrees` of freedom."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a probability between 0 and 1")
    if degrees < 1:
        raise ValueError(f"degrees is {degrees}, expected 1 at least")
    low, high = 0.0, math.pi / 2  # of θ
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _probability(middle, degrees) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _probability(theta: float, degrees: int) -> float:
    """P(|T| < √ν tan θ)."""
    square = math.cos(theta) ** 2
    odd = degrees % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):  # one pass for each power of cos θ up to ν − 2
        total += term
        term *= square * k / (k + 1)
    total *= math.sin(theta)
    return (theta + total) * 2 / math.pi if odd else total
