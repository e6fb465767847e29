"""--weighting_scheme against Diffusers' own functions, and against what is drawn."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from nara_diffusion.dreambooth.loss import windowed_schedule
from nara_diffusion.dreambooth.objectives import FlowObjective, build_objective
from nara_diffusion.dreambooth.objectives.density import SCHEMES, TimestepDensity
from nara_diffusion.dreambooth.objectives.timestep_bias import TimestepBias
from nara_diffusion.dreambooth.objectives.timesteps import draw_indices
from nara_diffusion.noise.window import EVERYTHING, NoiseWindow

DENSITIES = [
    TimestepDensity("logit_normal"),
    TimestepDensity("logit_normal", mean=0.7, std=0.5),
    TimestepDensity("mode"),
    TimestepDensity("mode", scale=-0.8),
]


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_levels_are_drawn_as_often_as_diffusers_scripts_draw_them(density: TimestepDensity) -> None:
    """They take scheduler.timesteps[⌊u N⌋], of which the first is pure noise."""
    count, levels = 400_000, 8
    torch.manual_seed(3)
    u = compute_density_for_timestep_sampling(density.scheme, count, density.mean, density.std, density.scale)
    timesteps = FlowMatchEulerDiscreteScheduler(num_train_timesteps=levels).timesteps[(u * levels).long()]  # 1 to 8
    expected = torch.bincount(timesteps.long() - 1, minlength=levels).double() / count
    weights = density.weights(levels)
    assert weights is not None
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(weights, expected, rtol=0, atol=5 * (0.25 / count) ** 0.5)  # five standard errors
    assert (weights - 1 / levels).abs().max() > 0.01


def test_a_positive_mean_is_less_noise() -> None:
    objective = FlowObjective(levels=1000)
    density = TimestepDensity("logit_normal", mean=1.0)
    schedule = windowed_schedule(objective, EVERYTHING, density=density)
    drawn = draw_indices(range(4000), seed=1, levels=1000, stratified=True, group_size=4000, windowed=schedule)
    assert objective.sigmas[drawn].median().item() == pytest.approx(torch.tensor(-1.0).sigmoid().item(), abs=2e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_count_what_diffusers_has_them_count(scheme: str) -> None:
    objective = FlowObjective(levels=50, shift=3.0, density=TimestepDensity(scheme))
    latents = torch.zeros(50, 1, 2, 3)
    weight = objective.corrupt(latents, latents, torch.arange(50)).weight
    expected = compute_loss_weighting_for_sd3(scheme, objective.sigmas).float()
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)],
    ids=["plain", "shifted"],
)
def test_noise_levels_are_those_of_the_scheduler(scheduler) -> None:
    objective = build_objective(scheduler)
    assert isinstance(objective, FlowObjective)
    torch.testing.assert_close(objective.sigmas.float(), scheduler.sigmas[:1000].flip(0).float(), rtol=1e-5, atol=1e-7)
    x, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    corrupted = objective.corrupt(x, noise, torch.tensor([10, 800]))
    sigma = scheduler.sigmas[:1000].flip(0)[[10, 800]].view(2, 1, 1, 1)
    torch.testing.assert_close(corrupted.model_input, (1 - sigma) * x + sigma * noise)
    torch.testing.assert_close(corrupted.model_input - sigma * corrupted.target, x)  # the last Euler step ends at x
    torch.testing.assert_close(corrupted.timestep, scheduler.timesteps.flip(0)[[10, 800]], rtol=1e-5, atol=1e-3)


def test_the_shift_of_a_scheduler_by_size_is_left_to_the_flag() -> None:
    assert build_objective(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)).sigmas[499] == 0.5
    wan = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    assert build_objective(wan).sigmas[499].item() == pytest.approx(5 / 6)
    assert build_objective(wan, shift=2.0).sigmas[499].item() == pytest.approx(2 / 3)


def test_window_bias_and_density_go_together() -> None:
    objective, density = FlowObjective(levels=10), TimestepDensity("logit_normal")
    bias = TimestepBias("later", multiplier=3.0, portion=0.5)
    schedule = windowed_schedule(objective, NoiseWindow(0.35, 0.85), bias, density)
    drawn = draw_indices(range(5000), seed=1, levels=10, stratified=True, group_size=5000, windowed=schedule)
    weights = density.weights(10)
    assert weights is not None
    expected = (weights * torch.tensor([1.0] * 5 + [3.0] * 5))[3:8]
    found = torch.bincount(drawn, minlength=10)[3:8] / 5000
    torch.testing.assert_close(found.double(), expected / expected.sum(), rtol=0, atol=1e-3)
    assert set(drawn.tolist()) == set(range(3, 8))
