"""Which findings lead to which verdict."""

from __future__ import annotations

import pytest
import torch

from nara_diffusion.check.comparison import BinComparison
from nara_diffusion.check.measurement import Findings
from nara_diffusion.check.verdict import LIKELY, THRESHOLDS, UNKNOWN, UNLIKELY, judge


def side(common: float, conflict: float, noise: float = 0.0) -> BinComparison:
    """Two bins (√common ± √conflict along two axes): ‖ḡ‖² = common, Σ w ‖g − ḡ‖² = conflict."""
    own, between = common + conflict, common - conflict
    products = torch.tensor([[own, between], [between, own]], dtype=torch.float64)
    return BinComparison([0, 1], torch.tensor([0.5, 0.5]).double(), products, products.diagonal() + noise)


def findings(
    before: BinComparison, after: BinComparison, losses: tuple[float, float] = (1.0, 0.5), told: float = 0.5
) -> Findings:
    return Findings({"layer": told}, before, after, {"layer": before}, {"layer": after}, *losses)


def test_verdict_is_likely_from_the_threshold_on_and_unlikely_up_to_the_other() -> None:
    for ratio, answer in (
        (THRESHOLDS.likely, LIKELY),
        (THRESHOLDS.likely * 0.99, UNKNOWN),
        (THRESHOLDS.unlikely * 1.01, UNKNOWN),
        (THRESHOLDS.unlikely * 0.99, UNLIKELY),
        (0.0, UNLIKELY),
    ):
        found = findings(side(8, 2), side(1, 10 * ratio * (1 + 1e-9)))
        assert found.conflict_ratio == pytest.approx(ratio)
        assert judge(found).answer == answer


def test_verdict_where_the_fit_did_too_little_asks_for_a_higher_rate() -> None:
    verdict = judge(findings(side(8, 2), side(7, 0.1)))
    assert verdict.answer == UNKNOWN
    assert "raise the learning rate" in verdict.reason


def test_verdict_where_bins_conflict_does_not_wait_for_the_end_of_the_fit() -> None:
    assert judge(findings(side(8, 2), side(7, 9))).answer == LIKELY


def test_verdict_where_the_loss_rose_asks_for_a_lower_rate() -> None:
    verdict = judge(findings(side(8, 2), side(1, 9), (1.0, 1.25)))
    assert verdict.answer == UNKNOWN
    assert "rose from 1 to 1.25" in verdict.reason
    assert "lower the learning rate" in verdict.reason


def test_verdict_where_no_static_update_lowers_the_loss_is_likely() -> None:
    assert judge(findings(side(0.01, 2), side(0.01, 2), (1.0, 1.01))).answer == LIKELY


def test_verdict_in_noise_asks_for_more_samples() -> None:
    for before in (side(8, 2, noise=1000), side(0, 0, noise=1)):
        verdict = judge(findings(before, side(1, 0)))
        assert verdict.answer == UNKNOWN
        assert "more samples" in verdict.reason


def test_verdict_does_not_read_r_squared() -> None:
    assert judge(findings(side(8, 2), side(1, 9), told=0.99)).answer == LIKELY
