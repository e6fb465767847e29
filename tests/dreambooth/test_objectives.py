"""Each objective, and a base's prediction read as another.

Against Diffusers' own schedulers, or the papers' formulas in float64.
"""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor

from nara_diffusion.dreambooth.objectives import build_objective, squared_errors

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
INDICES = torch.tensor([0, 3, 250, 640, 999])


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """(latents, noise, prediction), of unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(len(INDICES), 3, 4, 6, generator=generator) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_discrete_objective_matches_diffusers_corruption_and_weights(tensors, prediction_type: str) -> None:
    latents, noise, _ = tensors
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction_type)
    # the pipeline's scheduler is another class, of the same betas
    objective = build_objective(EulerDiscreteScheduler(**BETAS, prediction_type=prediction_type))
    batch = objective.corrupt(latents, noise, INDICES)
    velocity = scheduler.get_velocity(latents, noise, INDICES)
    targets = {"epsilon": noise, "v_prediction": velocity, "sample": latents}
    torch.testing.assert_close(batch.model_input, scheduler.add_noise(latents, noise, INDICES))
    torch.testing.assert_close(batch.target, targets[prediction_type])
    assert torch.equal(batch.timestep, INDICES)
    assert torch.equal(batch.weight, torch.ones(5))
    assert (objective.source.convention, objective.levels) == ("timestep", 1000)
    torch.testing.assert_close(objective.noise_levels[INDICES], INDICES / 1000)
    snr = compute_snr(scheduler, INDICES)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    weight = build_objective(scheduler, snr_gamma=5.0).corrupt(latents, noise, INDICES).weight
    torch.testing.assert_close(weight, snr.clamp(max=5.0) / divisor, rtol=1e-5, atol=1e-7)
    assert len(weight.unique()) > 2


@pytest.mark.parametrize(("kind", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_zero_terminal_snr_gives_finite_weights(tensors, kind: str, last: float) -> None:
    scheduler = DDPMScheduler(**BETAS, prediction_type=kind, rescale_betas_zero_snr=True)
    batch = build_objective(scheduler, snr_gamma=5.0).corrupt(*tensors[:2], INDICES)
    assert batch.weight.isfinite().all()
    assert batch.weight[-1].item() == pytest.approx(last, abs=1e-6)
    torch.testing.assert_close(batch.model_input[-1], tensors[1][-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_flow_objective_is_the_rectified_flows(tensors, snr_gamma: float | None) -> None:
    latents, noise, prediction = tensors
    objective = build_objective(FLOW, snr_gamma=snr_gamma)
    batch = objective.corrupt(latents, noise, INDICES)
    loss = squared_errors(prediction, batch)
    for i, index in enumerate(INDICES.tolist()):
        sigma, x, eps = (index + 1) / 1000, latents[i].double(), noise[i].double()
        noisy = (1 - sigma) * x + sigma * eps
        torch.testing.assert_close(batch.model_input[i], noisy.float())
        torch.testing.assert_close(batch.target[i], (eps - x).float())
        # min-SNR counts the squared error of x̂ = x_σ − σ F
        error = (noisy - sigma * prediction[i].double() - x).square().mean()
        counted = 1 / sigma**2 if snr_gamma is None else min(((1 - sigma) / sigma) ** 2, snr_gamma)
        assert loss[i].item() == pytest.approx(counted * error.item(), rel=1e-4, abs=1e-9)
        assert batch.timestep[i].item() == pytest.approx(1000 * sigma)
    torch.testing.assert_close(objective.source.noise_level(batch.timestep), (INDICES + 1) / 1000)
    assert (objective.source.convention, objective.levels) == ("flow", 1000)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noise_levels_are_those_of_the_scheduler(tensors, shift: float) -> None:
    latents, noise, _ = tensors
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    timesteps = scheduler.timesteps.flip(0)[INDICES]
    batch = build_objective(scheduler).corrupt(latents, noise, INDICES)
    torch.testing.assert_close(batch.timestep, timesteps, rtol=1e-5, atol=1e-3)
    sigma = scheduler.sigmas[:1000].flip(0)[INDICES].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.model_input, (1 - sigma) * latents + sigma * noise, rtol=1e-5, atol=1e-5)


def test_shift_is_the_schedulers_unless_given() -> None:
    wan = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    cases = [(dynamic, None, 0.5), (wan, None, 5 / 6), (wan, 2.0, 2 / 3)]
    for scheduler, shift, expected in cases:
        assert build_objective(scheduler, shift=shift).q[499].item() == pytest.approx(expected)


@pytest.mark.parametrize("scheme", ["logit_normal", "cosmap", "sigma_sqrt"])
def test_weighting_scheme_weights_errors_as_diffusers(scheme: str) -> None:
    objective = build_objective(FLOW, shift=3.0, weighting_scheme=scheme)
    torch.testing.assert_close(objective.weight, compute_loss_weighting_for_sd3(scheme, objective.q).float())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            DDPMScheduler(prediction_type="flow"),
            "prediction_type 'flow' can't be trained with.*: epsilon",
        ),
        (EDMEulerScheduler(), "EDMEulerScheduler with prediction_type 'epsilon' can't be trained with"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "betas and discrete timesteps",
        ),
    ],
)
def test_schedule_without_an_objective_is_refused(scheduler, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(scheduler)
