"""The scheduler of a converted model: which one, that its objective is the formula's, and what can't be converted."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.objectives.conversion import check_conversion, converted_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
INDICES = torch.tensor([0, 7, 333, 801, 999])


def rescaled_alphas() -> torch.Tensor:
    """ᾱ of zero terminal SNR, float64: arXiv 2305.08891, algorithm 1, which shifts and scales √ᾱ."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize("base", [EulerDiscreteScheduler(**BETAS), DDIMScheduler(**BETAS, timestep_spacing="leading")])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_conversion_to_v_keeps_class_and_betas(base, zero_snr: bool) -> None:
    scheduler = converted_scheduler(base, "v_prediction", zero_snr)
    assert type(scheduler) is type(base)
    assert scheduler.config.prediction_type == "v_prediction"
    spacing = "trailing" if zero_snr else base.config.timestep_spacing
    assert (scheduler.config.rescale_betas_zero_snr, scheduler.config.timestep_spacing) == (zero_snr, spacing)
    latents, noise = torch.randn(2, len(INDICES), 3, 4, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    objective = build_objective(scheduler)
    batch = objective.corrupt(latents, noise, INDICES)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = rescaled_alphas() if zero_snr else (1 - betas).cumprod(0)
    for i, index in enumerate(INDICES.tolist()):
        a, x, eps = alphas[index], latents[i].double(), noise[i].double()
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if zero_snr else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(batch.model_input[i].double(), a.sqrt() * x + (1 - a).sqrt() * eps, **tolerance)
        torch.testing.assert_close(batch.target[i].double(), a.sqrt() * eps - (1 - a).sqrt() * x, **tolerance)
    assert objective.source.convention == "timestep"


@pytest.mark.parametrize("base", [EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True), PNDMScheduler(**BETAS)])
def test_conversion_to_a_flow_is_sampled_by_dpm_solver_from_any_base(base) -> None:
    scheduler = converted_scheduler(base, "flow_prediction", False)
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    assert (scheduler.config.prediction_type, scheduler.config.use_flow_sigmas) == ("flow_prediction", True)
    assert build_objective(scheduler).source.convention == "flow"


def test_flow_scheduler_follows_the_exact_velocity_from_noise_to_data() -> None:
    """Data N(0, ¼): x_σ has variance v = (1 − σ)²/4 + σ², the velocity is (σ − (1 − σ)/4) x_σ / v, and x = ε / 2."""
    scheduler = converted_scheduler(EulerDiscreteScheduler(**BETAS), "flow_prediction", False)
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(100)
    sample = scheduler.init_noise_sigma * noise
    for timestep in scheduler.timesteps:
        sigma = timestep.item() / 1000  # what the UNet is told, whole thousandths
        variance = (1 - sigma) ** 2 / 4 + sigma**2
        velocity = (sigma - (1 - sigma) / 4) / variance * scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, noise / 2, rtol=0, atol=0.02)


def test_a_class_without_the_option_gives_way_to_euler() -> None:
    scheduler = converted_scheduler(PNDMScheduler(**BETAS), "v_prediction", True)
    assert isinstance(scheduler, EulerDiscreteScheduler)
    assert {name: scheduler.config[name] for name in BETAS} == BETAS
    assert scheduler.config.rescale_betas_zero_snr


@pytest.mark.parametrize(
    ("base", "prediction_type", "zero_snr"),
    [
        (EulerDiscreteScheduler(**BETAS), None, False),
        (EulerDiscreteScheduler(**BETAS), "epsilon", False),
        (EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True), None, True),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "flow_prediction",
            False,
        ),
        (EDMEulerScheduler(), None, False),
        (FlowMatchEulerDiscreteScheduler(), None, False),
    ],
)
def test_a_base_that_does_it_already_keeps_its_scheduler(base, prediction_type, zero_snr: bool) -> None:
    assert converted_scheduler(base, prediction_type, zero_snr) is base


@pytest.mark.parametrize(
    ("base", "prediction_type", "zero_snr", "message"),
    [
        (
            EulerDiscreteScheduler(**BETAS),
            None,
            True,
            "predict ε: .* add --prediction_type v_pred",
        ),
        (EDMEulerScheduler(), "v_prediction", False, "EDMEulerScheduler is an EDM scheduler"),
        (FlowMatchEulerDiscreteScheduler(), "epsilon", False, "FlowMatchEulerDiscreteScheduler has no betas"),
        (FLOW, "v_prediction", False, "DPMSolverMultistepScheduler has no betas to convert the model to: leave pre"),
    ],
)
def test_a_base_that_cannot_be_converted_is_refused(base, prediction_type, zero_snr: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        converted_scheduler(base, prediction_type, zero_snr)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("flow_prediction", True, False), "leave it out with prediction_type 'flow_prediction'"),
        (("flow_prediction", False, True), "do_edm_style_training has no terms for prediction_type 'flow_prediction'"),
        (("v_prediction", True, True), "do_edm_style_training has no terms for rescale_betas_zero_snr"),
        (("sample", False, False), "prediction_type is 'sample', expected one of epsilon, v_prediction, flow_pred"),
        (("epsilon", True, False), "add --prediction_type v_prediction"),
    ],
)
def test_choices_that_make_no_sense_together_are_refused(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_conversion(*given)
