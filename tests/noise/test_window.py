"""Which u goes where: inside of a window of λ, or outside of it, and that both are spread evenly."""

import math

import pytest
import torch

from nara_diffusion.noise.window import EVERYTHING, NoiseWindow


def test_window_contains_its_lower_end_and_not_its_upper_one() -> None:
    window = NoiseWindow(0.3, 0.7)
    timesteps = torch.tensor([0, 299, 300, 301, 699, 700, 999])
    assert window.contains(timesteps / 1000).tolist() == [False, False, True, True, True, False, False]
    assert NoiseWindow(0.7, 1.0).contains(torch.tensor([0.69, 0.7, 1.0])).tolist() == [False, True, True]
    assert EVERYTHING.contains(torch.tensor([0.0, 1.0])).all()


@pytest.mark.parametrize("edge", [0.1, 1 / 3, 0.5, 0.7])
def test_two_windows_that_meet_divide_every_noise_level(edge: float) -> None:
    levels = torch.arange(1001) / 1000
    lower, upper = NoiseWindow(0.0, edge).contains(levels), NoiseWindow(edge, 1.0).contains(levels)
    assert torch.equal(lower, ~upper)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_divide_of_even_numbers_is_even_on_both_sides(share: float) -> None:
    n = 16
    u = (torch.arange(n, dtype=torch.float64) + torch.rand(n, dtype=torch.float64)) / n
    v, outside = NoiseWindow(0.2, 0.6, hold_weight=2.0, outside_share=share).divide(u, 0.6)
    assert outside.sum() == n * share
    for part in (v[outside], v[~outside]):
        assert sorted((part * len(part)).long().tolist()) == list(range(len(part)))


def test_divide_takes_the_share_of_what_lies_outside_by_default() -> None:
    u = torch.arange(1000, dtype=torch.float64) / 1000
    _, outside = NoiseWindow(0.2, 0.6, hold_weight=2.0).divide(u, 0.6)
    assert outside.sum() == 600
    v, outside = NoiseWindow(0.2, 0.6).divide(u, 0.6)  # without a weight nothing is outside
    assert torch.equal(v, u)
    assert not outside.any()


@pytest.mark.parametrize("u", [0.0, 0.5 - 2**-54, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("share", [0.5, 0.1, 1 / 3])
def test_divide_stays_below_one(u: float, share: float) -> None:
    v, _ = NoiseWindow(0.2, 0.6, hold_weight=1.0, outside_share=share).divide(torch.tensor([u]).double(), 0.6)
    assert 0 <= v.item() < 1


@pytest.mark.parametrize(
    "ends", [(0.6, 0.2), (0.5, 0.5), (300, 700), (-0.1, 0.5), (0.0, 1.5), (math.nan, 1.0), (0.0, math.nan)]
)
def test_window_without_a_noise_level_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=rf"low is {ends[0]} and high {ends[1]}, expected 0 ≤ low < high ≤ 1"):
        NoiseWindow(*ends)


@pytest.mark.parametrize("name", ["hold_weight", "outside_share"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_or_share_that_holds_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}, expected a number"):
        NoiseWindow(0.0, 0.5, **{"hold_weight": 1.0, name: value})
