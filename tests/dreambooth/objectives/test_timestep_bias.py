"""Biased timesteps: Diffusers' probabilities, strata of equal weight, windows, and λ from what the model is given."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler

from nara_diffusion.dreambooth.loss import windowed_schedule
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.objectives.timestep_bias import NO_BIAS, TimestepBias
from nara_diffusion.dreambooth.objectives.timesteps import draw_indices
from nara_diffusion.noise.window import EVERYTHING, NoiseWindow

DDPM = build_objective(DDPMScheduler())


def drawn(window: NoiseWindow, bias: TimestepBias, count: int, group: int = 1, objective: Any = DDPM) -> torch.Tensor:
    windowed = windowed_schedule(objective, window, bias)
    options: dict[str, Any] = {"seed": 4, "levels": objective.levels, "windowed": windowed}
    return draw_indices(range(count), stratified=group > 1, group_size=group, **options)


@pytest.mark.parametrize(
    ("bias", "chosen"),
    [
        (TimestepBias("earlier", 3.0), range(250)),
        (TimestepBias("later", 0.5, portion=0.4), range(600, 1000)),
        (TimestepBias("range", 4.0, begin=100, end=300), range(100, 300)),
        (TimestepBias("range", 2.0, begin=900), range(900, 1000)),
    ],
)
def test_timesteps_come_as_often_as_diffusers_scripts_draw_them(bias: TimestepBias, chosen: range) -> None:
    weights = torch.ones(1000)
    weights[list(chosen)] *= bias.multiplier
    expected = (weights / weights.sum()).reshape(20, 50).sum(1)
    # one of 4000 strata each, so that a count is off by one at either end at most
    counts = torch.bincount(drawn(EVERYTHING, bias, 4000, group=4000) // 50, minlength=20)
    torch.testing.assert_close(counts.float(), 4000 * expected, rtol=0, atol=2)
    counts = torch.bincount(drawn(EVERYTHING, bias, 4000) // 50, minlength=20)
    torch.testing.assert_close(counts.float(), 4000 * expected, rtol=0, atol=5 * (4000 * expected.max().item()) ** 0.5)


def strata(levels: torch.Tensor, first: int, width: int) -> list[int]:
    return sorted(((levels - first) // width).tolist())


def test_stratified_timesteps_take_one_stratum_of_equal_weight_each() -> None:
    """250 levels of weight 5 and 750 of weight 1 are 2000: of 8 samples 5 have 50 levels each, 3 have 250."""
    for group in drawn(EVERYTHING, TimestepBias("later", 5.0), 320, group=8).reshape(40, 8):
        assert strata(group[group >= 750], 750, 50) == list(range(5))
        assert strata(group[group < 750], 0, 250) == list(range(3))


def test_in_a_window_the_chosen_levels_come_more_often_than_the_others_there() -> None:
    levels = drawn(NoiseWindow(0.5, 1.0), TimestepBias("later", 5.0), 240, group=6)
    for group in levels.reshape(40, 6):
        assert strata(group[group >= 750], 750, 50) == list(range(5))
        assert strata(group[group < 750], 500, 250) == [0]


def test_where_the_base_is_held_the_share_outside_is_that_of_the_weights() -> None:
    """Inside 250 · 5 + 250, outside 500."""
    levels = drawn(NoiseWindow(0.0, 0.5, hold_weight=1.0), TimestepBias("earlier", 5.0), 320, group=8)
    for group in levels.reshape(40, 8):
        assert strata(group[group < 250], 0, 50) == list(range(5))
        assert strata(group[(group >= 250) & (group < 500)], 250, 250) == [0]
        assert strata(group[group >= 500], 500, 250) == [0, 1]


def test_a_position_draws_the_same_in_any_batch_and_by_itself() -> None:
    windowed = windowed_schedule(DDPM, EVERYTHING, TimestepBias("later", 5.0))
    options: dict[str, Any] = {"seed": 5, "levels": 1000, "stratified": True, "group_size": 4, "windowed": windowed}
    together = draw_indices([7, 3, 12, 4], **options)
    assert together.tolist() == [draw_indices([p], **options).item() for p in (7, 3, 12, 4)]
    assert draw_indices([7, 3, 12, 4], role="class", **options).tolist() != together.tolist()


def test_without_a_bias_or_with_equal_weights_nothing_changes() -> None:
    assert NO_BIAS.weights(1000) is None
    plain = windowed_schedule(DDPM, EVERYTHING)
    u = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nearly = windowed_schedule(DDPM, EVERYTHING, TimestepBias("range", 1 + 1e-9, begin=3, end=5))
    assert torch.equal(plain.indices(u), nearly.indices(u))
    assert nearly.indices(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [0, 999]


@pytest.mark.parametrize(
    "scheduler",
    [DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), EDMEulerScheduler()],
)
def test_later_means_more_noise_in_any_schedule(scheduler: Any) -> None:
    objective = build_objective(scheduler)
    indices = drawn(EVERYTHING, TimestepBias("later", 1e6), 200, objective=objective)
    nothing = torch.zeros(objective.levels, 1, 1, 1)
    every = objective.source.noise_level(objective.corrupt(nothing, nothing, torch.arange(objective.levels)).timestep)
    assert (every.diff() > 0).all()
    assert every[indices].min() >= every[-int(0.25 * objective.levels)]
