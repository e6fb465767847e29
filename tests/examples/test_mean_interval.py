"""The 95 % interval of a few values."""

from __future__ import annotations

import math

import pytest
from mean_interval import interval


def test_interval_is_students_and_single_value_has_none():
    """t of Abramowitz & Stegun, table 26.10."""
    for count, t in [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045)]:
        values = [float(i % 3) for i in range(count)]
        mean, std, low, high = interval(values)
        assert mean == pytest.approx(sum(values) / count)
        assert std == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1)))
        assert high - mean == pytest.approx(mean - low) == pytest.approx(t * std / math.sqrt(count), rel=2e-4)
    mean, *spread = interval([0.25])
    assert mean == 0.25
    assert all(math.isnan(value) for value in spread)
