"""Draws have the distributions that they promise, within windows too; those of a batch are in `test_training_step`."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from nara_diffusion.dreambooth.dataset import (
    draw_indices,
    draw_noise,
    drawable_levels,
    numpy_generator,
    torch_generator,
)
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.noise.strength_schedule import NoiseWindow

LEVELS = torch.arange(1000)
STRATIFIED: dict[str, Any] = {"seed": 4, "stratified": True}


def test_random_numbers_depend_on_seed_stream_and_index() -> None:
    keys = [(7, "noise", 5), (8, "noise", 5), (7, "crop", 5), (7, "noise", 6), (5, "noise", 7)]
    assert len({float(torch.randn((), generator=torch_generator(*key))) for key in keys}) == len(keys)
    assert len({float(numpy_generator(*key).random()) for key in keys}) == len(keys)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 0.7)])
def test_stratified_indices_take_one_stratum_of_the_window_each(low: float, high: float) -> None:
    objective = build_objective(DDPMScheduler())
    levels = drawable_levels(objective.noise_levels, NoiseWindow(low, high))
    first, count, n = round(1000 * low), round(1000 * (high - low)), 10
    assert levels.tolist() == list(range(first, first + count))
    for group in draw_indices(range(40 * n), levels, **STRATIFIED, group_size=n).reshape(40, n):
        assert sorted(((group - first) * n // count).tolist()) == list(range(n))


def test_window_without_a_noise_level_is_refused_with_the_schedules() -> None:
    with pytest.raises(ValueError, match=r"0\.9991 and max_noise_level 0\.9999, but of the 1000 .* to 0\.999, none"):
        drawable_levels(build_objective(DDPMScheduler()).noise_levels, NoiseWindow(0.9991, 0.9999))


@pytest.mark.parametrize(
    ("scheme", "density", "window"),
    [
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}, NoiseWindow(0.3, 0.8)),
        ("logit_normal", {"logit_mean": 0.7, "logit_std": 0.5}, NoiseWindow()),
        ("mode", {"mode_scale": 1.29}, NoiseWindow()),
        ("mode", {"mode_scale": -0.8}, NoiseWindow(0.3, 0.8)),
    ],
    ids=str,
)
def test_levels_are_drawn_as_often_as_diffusers_scripts_draw_them(scheme: str, density: dict, window) -> None:
    """They take scheduler.timesteps[⌊u N⌋], of which the first is pure noise."""
    count, n = 1_000_000, 10
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=n)
    u = compute_density_for_timestep_sampling(scheme, count, generator=torch.Generator().manual_seed(3), **density)
    theirs = torch.bincount(scheduler.timesteps[(u * n).long()].long() - 1, minlength=n).double()
    objective = build_objective(scheduler)
    theirs[~window.contains(objective.noise_levels)] = 0
    levels = drawable_levels(objective.noise_levels, window, scheme, **density)
    drawn = draw_indices(range(4000), levels, **STRATIFIED, group_size=4000)
    ours = torch.bincount(drawn, minlength=n).double()
    torch.testing.assert_close(ours / ours.sum(), theirs / theirs.sum(), rtol=0, atol=4e-3)
    assert (ours[ours > 0] / ours.sum() - 1 / (ours > 0).sum()).abs().max() > 0.01


def test_noise_is_normal_and_an_offset_shifts_each_channel_of_it() -> None:
    noise = draw_noise(range(400), (2, 4, 4), seed=3)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert (torch.corrcoef(noise[:40].flatten(1)).triu(1).abs() < 0.75).all()
    assert not torch.isclose(noise, draw_noise(range(400), (2, 4, 4), seed=3, role="class"), atol=1e-5).all(-1).any()
    shift = draw_noise(range(400), (2, 4, 4), seed=3, offset=0.3) - noise  # the same ε, and one δ a channel
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.3, abs=0.03)
    assert abs(torch.corrcoef(shift[:, :, 0, 0].T)[0, 1].item()) < 0.15
