"""Which λ lie inside of a window."""

import math

import pytest
import torch

from nara_diffusion.noise.strength_schedule import EVERYTHING, NoiseWindow


def test_window_contains_its_lower_end_and_not_its_upper_one() -> None:
    window = NoiseWindow(0.3, 0.7)
    timesteps = torch.tensor([0, 299, 300, 301, 699, 700, 999])
    assert window.contains(timesteps / 1000).tolist() == [False, False, True, True, True, False, False]
    assert NoiseWindow(0.7, 1.0).contains(torch.tensor([0.69, 0.7, 1.0])).tolist() == [False, True, True]
    assert EVERYTHING.contains(torch.tensor([0.0, 1.0])).all()


def test_two_windows_that_meet_divide_every_noise_level() -> None:
    for edge in [0.1, 1 / 3, 0.5, 0.7]:
        levels = torch.arange(1001) / 1000
        lower, upper = NoiseWindow(0.0, edge).contains(levels), NoiseWindow(edge, 1.0).contains(levels)
        assert torch.equal(lower, ~upper)


def test_window_without_a_noise_level_is_refused() -> None:
    for ends in [(0.6, 0.2), (0.5, 0.5), (300, 700), (-0.1, 0.5), (0.0, 1.5), (math.nan, 1.0), (0.0, math.nan)]:
        with pytest.raises(ValueError, match=rf"low is {ends[0]} and high {ends[1]}, expected 0 ≤ low < high ≤ 1"):
            NoiseWindow(*ends)
