"""Which losses lead to which difference, and which difference to which verdict."""

from __future__ import annotations

import math

import pytest
import torch

from nara_diffusion.check.comparison import by_bins, learnt_losses, mean_losses, relative_difference
from nara_diffusion.check.trial import Repeat
from nara_diffusion.check.verdict import LIKELY, THRESHOLDS, UNKNOWN, UNLIKELY, after_steps, judge

LEVELS = torch.tensor([0.05, 0.95, 0.07, 1.0])


def repeat(
    low: float, high: float | None = None, *, lora: float = 1.0, untold: float = 1.0, base: float = 2.0
) -> Repeat:
    """NaRA's losses at the lowest λ, and at the highest, where all losses are a hundredth."""
    size = torch.tensor([3.0, 0.03, 1.0, 0.01]).double()
    nara = torch.tensor([low, low if high is None else high] * 2).double()
    return Repeat(LEVELS, {"base": base * size, "lora": lora * size, "untold": untold * size, "nara": nara * size})


def test_relative_difference_counts_each_bin_alike() -> None:
    """−10 % where losses are large and −30 % where they are a hundredth: −20 %; by Student's t over three repeats."""
    repeats = [repeat(0.9, 0.7), repeat(0.8, 0.7), repeat(0.7, 0.7)]
    found = relative_difference(repeats, "lora")
    assert found.mean == pytest.approx(-0.25)
    half = 4.302653 * 0.05 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(-0.25 - half), pytest.approx(-0.25 + half))
    assert relative_difference(repeats, "base").mean == pytest.approx(-0.625)


def test_relative_difference_in_a_bin_is_of_the_sums() -> None:
    losses = {"lora": torch.tensor([1.0, 1, 3, 1]).double(), "nara": torch.tensor([2.0, 1, 1, 1]).double()}
    first, last = by_bins([Repeat(LEVELS, losses)])
    assert first.difference.mean == pytest.approx(3 / 4 - 1)  # not the mean of 2 and 1/3
    assert last.difference.mean == pytest.approx(0)


def test_relative_difference_is_zero_where_no_arm_has_a_loss() -> None:
    """No token of a text is masked, or the base is held and nothing drifts."""
    losses = {"lora": torch.zeros(4).double(), "nara": torch.zeros(4).double()}
    assert by_bins([Repeat(LEVELS, losses)])[0].difference.mean == 0
    assert by_bins([Repeat(LEVELS, losses | {"nara": torch.ones(4).double()})])[0].difference.mean == 1


def test_relative_difference_is_bounded_and_changes_its_sign_with_the_arms() -> None:
    """A hundred times as large is +99 %, as a hundredth is −99 %."""
    assert relative_difference([repeat(100.0)] * 2, "lora").mean == pytest.approx(0.99)
    assert relative_difference([repeat(0.01)] * 2, "lora").mean == pytest.approx(-0.99)


def test_by_bins_has_means_over_repeats_of_the_bins_with_samples() -> None:
    repeats = [repeat(0.9, 0.7), repeat(0.35, 0.35, lora=0.5)]
    first, last = by_bins(repeats)
    assert (first.low, last.high) == (0.0, 1.0)
    assert first.losses == pytest.approx({"base": 4, "lora": (2 + 1) / 2, "untold": 2, "nara": (1.8 + 0.7) / 2})
    assert last.difference.mean == pytest.approx(-0.3)
    assert mean_losses(repeats)["base"] == pytest.approx(2 * 4.04 / 4)


@pytest.mark.parametrize(
    ("against_lora", "without_noise_level", "answer"),
    [
        ((-0.20, -0.22, -0.21), 1.0, LIKELY),
        ((-0.030, -0.032, -0.031), 1.0, LIKELY),
        ((-0.010, -0.012, -0.011), 1.0, UNKNOWN),  # clear of zero, but little so far
        ((-0.010, -0.012, -0.011), 0.99, UNLIKELY),
        ((0.001, -0.002, 0.0), 1.0, UNLIKELY),
        ((-0.012, -0.006, -0.003), 1.0, UNKNOWN),  # zero lies inside and −2 % outside, but a gain may grow
        ((-0.009, -0.003, -0.001), 1.0, UNLIKELY),
        ((0.1, 0.12, 0.11), 1.2, UNLIKELY),
        ((-0.05, 0.05, 0.01), 1.0, UNKNOWN),
        ((-0.30, 0.05, -0.1), 1.0, UNKNOWN),
        ((-0.200, -0.201, -0.202), 0.8, UNLIKELY),  # not from knowing λ
    ],
)
def test_verdict_rests_on_both_differences_and_their_intervals(
    against_lora: tuple[float, ...], without_noise_level: float, answer: str
) -> None:
    verdict = judge([repeat(1 + each, untold=without_noise_level) for each in against_lora])
    assert verdict.answer == answer
    assert "3 repeats" in verdict.reason
    asks_for_steps = (
        answer == UNKNOWN
        and relative_difference([repeat(1 + each, untold=without_noise_level) for each in against_lora], "lora").high
        < 0
    )
    assert ("more steps" in verdict.reason) == asks_for_steps
    assert ("more repeats" in verdict.reason) == (answer == UNKNOWN and not asks_for_steps)


def test_verdict_where_nothing_was_learnt_asks_for_a_higher_rate() -> None:
    least = 1 - THRESHOLDS.learnt
    few = judge([repeat(1.0, base=1 / (least + 0.001))] * 3)
    assert few.answer == UNKNOWN
    assert "raise the learning rate or the steps" in few.reason
    assert judge([repeat(1.0, base=1 / (least - 0.001))] * 3).answer == UNLIKELY


def test_what_is_learnt_in_a_window_counts_alone_where_the_base_is_held_elsewhere() -> None:
    """NaRA's 3 % inside are 0.9 % of all: no loss can fall where the base is held."""
    held = torch.tensor([True, False, True, False])
    size = torch.tensor([2.0, 1.0, 1.0, 1.0]).double()
    inside = torch.where(held, 1.0, 0.97)
    losses = {"base": size, "lora": size, "untold": size, "nara": inside * size}
    assert "raise the learning rate" in judge([Repeat(LEVELS, losses)] * 3).reason
    assert judge([Repeat(LEVELS, losses, held)] * 3).answer == UNKNOWN
    repeats = [Repeat(LEVELS, losses | {"nara": factor * inside * size}, held) for factor in (0.99, 1.0, 0.995)]
    assert learnt_losses(repeats) == pytest.approx({"base": 1, "lora": 1, "untold": 1, "nara": 0.97 * 0.995})
    assert learnt_losses([Repeat(LEVELS, losses)])["nara"] == pytest.approx(4.94 / 4)
    assert "raise the learning rate" not in judge(repeats).reason
    all_held = Repeat(LEVELS, losses, torch.ones(4, dtype=torch.bool))
    assert "raise the learning rate" in judge([all_held] * 3).reason


def test_verdict_where_only_nara_learns_is_likely() -> None:
    assert judge([repeat(0.5 + 0.01 * i, base=1.0) for i in range(3)]).answer == LIKELY


def test_unlikely_after_few_steps_is_open() -> None:
    unlikely, likely = judge([repeat(1.0)] * 3), judge([repeat(0.5 + 0.01 * i, base=1.0) for i in range(3)])
    assert (unlikely.answer, likely.answer) == (UNLIKELY, LIKELY)
    assert after_steps(unlikely, 100) == unlikely
    assert after_steps(likely, 1) == likely
    few = after_steps(unlikely, 99)
    assert few.answer == UNKNOWN
    assert "not below zero; but 99 steps are fewer than the 100 that" in few.reason
    assert few.reason.endswith("C(λ) starts at I: take 100.")
