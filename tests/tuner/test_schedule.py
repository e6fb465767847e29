"""StrengthSchedule: its values between, at and beyond its points, its steps, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from nara_diffusion import StrengthSchedule
from nara_diffusion.noise.signals import as_signal

POINTS = [(0.1, 1.5), (0.4, -0.5), (0.8, 0.2)]
SCHEDULE = StrengthSchedule(POINTS)


def test_schedule_equals_numpy_s_interpolation_everywhere():
    levels = torch.linspace(0, 1, 1001)
    expected = np.interp(levels.double().numpy(), *zip(*POINTS, strict=True))
    assert SCHEDULE(levels).dtype == torch.float32
    np.testing.assert_allclose(SCHEDULE(levels).double().numpy(), expected, rtol=0, atol=3e-7)


def test_schedule_of_one_point_is_constant():
    assert torch.equal(StrengthSchedule([(0.3, 0.7)])(torch.tensor([0.0, 0.3, 1.0])), torch.full((3,), 0.7))


def test_schedule_of_a_number_is_one_value():
    assert torch.equal(SCHEDULE(0.1), torch.tensor([1.5]))


@pytest.mark.parametrize("timestep", range(0, 1001, 50))
def test_a_step_takes_the_second_strength_from_its_level_on(timestep):
    """Also where no float is exactly that λ: a timestep over 1000 meets the point that was written as its decimal."""
    level = timestep / 1000
    schedule = StrengthSchedule([(level, 2.0), (level, -3.0)])
    at = torch.tensor(float(timestep)) / 1000  # as a denoiser's timestep becomes λ, in float32
    assert schedule(at).item() == -3.0
    below = torch.nextafter(at, torch.tensor(-1.0))
    if timestep > 0:
        assert schedule(below).item() == 2.0


def test_a_step_between_slopes_keeps_both_sides():
    schedule = StrengthSchedule([(0, 1.0), (0.5, 0.0), (0.5, 4.0), (1, 2.0)])
    levels = torch.tensor([0.0, 0.25, 0.49999, 0.5, 0.75, 1.0])
    torch.testing.assert_close(schedule(levels), torch.tensor([1.0, 0.5, 2e-5, 4.0, 3.0, 2.0]), rtol=0, atol=1e-6)


def test_a_step_at_either_end_counts():
    levels = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(StrengthSchedule([(1, 1.0), (1, 0.0)])(levels), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(StrengthSchedule([(0, 1.0), (0, 0.0)])(levels), torch.zeros(3))


def test_gradient_by_the_level_is_the_slope():
    levels = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.9], requires_grad=True)
    SCHEDULE(levels).sum().backward()
    torch.testing.assert_close(levels.grad, torch.tensor([0.0, -2 / 0.3, 0.7 / 0.4, 0.0, 0.0]))


def test_schedule_maps_under_vmap():
    levels = torch.tensor([[0.05, 0.2], [0.5, 0.9]])
    mapped = torch.vmap(lambda level: SCHEDULE.at(as_signal(level)))(levels)
    assert torch.equal(mapped, torch.stack([SCHEDULE(row) for row in levels]))


def test_schedules_of_the_same_points_are_equal_and_survive_copies():
    again = StrengthSchedule(SCHEDULE.as_lists())
    assert again == SCHEDULE
    assert hash(again) == hash(SCHEDULE)
    assert StrengthSchedule([(0.1, 1.5)]) != SCHEDULE
    assert copy.deepcopy(SCHEDULE) == SCHEDULE == pickle.loads(pickle.dumps(SCHEDULE))
    assert eval(repr(SCHEDULE)) == SCHEDULE


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "points is empty: pass at least one"),
        ("0:1", "points is '0:1': pass pairs"),
        (0.7, "points is 0.7: pass pairs"),
        ({0: 1.0}, r"points is \{0: 1.0\}: pass pairs"),
        ([0.3], "points holds 0.3: pass pairs"),
        ([(0.3, 1.0, 2.0)], r"points holds \(0.3, 1.0, 2.0\): pass pairs"),
        ([(0.3, "1")], r"points holds \(0.3, '1'\): pass pairs .* of finite numbers"),
        ([(0.3, True)], "of finite numbers"),
        ([(0.3, float("nan"))], "of finite numbers"),
        ([(float("nan"), 1.0)], "of finite numbers"),
        ([(0.3, float("inf"))], "of finite numbers"),
        ([(-0.1, 1.0)], r"λ is -0.1: λ lies in \[0, 1\]"),
        ([(0, 1.0), (700, 0.3)], r"points holds \(700, 0.3\), whose λ is 700: .* λ = t / 1000"),
        ([(0.7, 1.0), (0.2, 0.3)], "λ 0.2 after λ 0.7: pass the points by ascending λ"),
        ([(0.5, 1.0), (0.5, 2.0), (0.5, 3.0)], "three points at λ 0.5"),
    ],
)
def test_schedule_refuses_what_is_no_function_of_lambda(points, message):
    with pytest.raises(ValueError, match=message):
        StrengthSchedule(points)


def test_schedule_refuses_a_level_out_of_range():
    with pytest.raises(ValueError, match="noise_level is"):
        SCHEDULE(torch.tensor([0.2, 1.2]))
