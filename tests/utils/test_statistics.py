"""Student's t against printed tables, and the interval against a sum by hand."""

import math

import pytest

from nara_diffusion.utils.statistics import interval, student_t


# Abramowitz & Stegun, table 26.10, columns A = 0.90, 0.95 and 0.99
@pytest.mark.parametrize(
    ("degrees", "table"),
    [
        (1, (6.314, 12.706, 63.657)),
        (2, (2.920, 4.303, 9.925)),
        (3, (2.353, 3.182, 5.841)),
        (4, (2.132, 2.776, 4.604)),
        (5, (2.015, 2.571, 4.032)),
        (9, (1.833, 2.262, 3.250)),
        (10, (1.812, 2.228, 3.169)),
        (29, (1.699, 2.045, 2.756)),
        (30, (1.697, 2.042, 2.750)),
        (120, (1.658, 1.980, 2.617)),
    ],
)
def test_quantiles_are_those_of_the_table(degrees, table):
    found = [student_t(confidence, degrees) for confidence in (0.90, 0.95, 0.99)]
    assert [round(t, 3) for t in found] == list(table)


@pytest.mark.parametrize("confidence", [0.05, 0.5, 0.999])
def test_quantiles_of_one_and_two_degrees_have_a_formula(confidence):
    assert student_t(confidence, 1) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-12)
    assert student_t(confidence, 2) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)), rel=1e-12)


def test_many_degrees_approach_the_normal_distribution():
    assert student_t(0.95, 100_000) == pytest.approx(1.959964, abs=1e-4)


def test_interval_of_five_values():
    mean, std, low, high = interval([0.5, 0.7, 0.6, 0.9, 0.8])
    assert mean == pytest.approx(0.7)
    assert std == pytest.approx(math.sqrt((0.04 + 0.0 + 0.01 + 0.04 + 0.01) / 4))
    assert high - mean == pytest.approx(mean - low) == pytest.approx(2.776445 * std / math.sqrt(5), rel=1e-6)


def test_another_confidence():
    found = interval([1.0, 2.0, 3.0], confidence=0.9)
    assert found.high == pytest.approx(2.0 + 2.919986 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_spread():
    mean, *rest = interval([0.25])
    assert mean == 0.25
    assert all(math.isnan(value) for value in rest)


def test_equal_values_have_an_interval_of_no_width():
    assert interval([0.1, 0.1, 0.1]) == pytest.approx((0.1, 0.0, 0.1, 0.1))


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_values_that_have_no_interval_are_refused(values):
    with pytest.raises(ValueError, match="expected one finite number or more"):
        interval(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match="expected a probability between 0 and 1"):
        interval([1.0, 2.0], confidence=confidence)
