"""Each loss against Diffusers' own schedulers, or the paper's formula in float64."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_snr

from nara_diffusion import TimestepNoise
from nara_diffusion.dreambooth.objectives import (
    Corrupted,
    DiscreteObjective,
    FlowObjective,
    PreconditionedObjective,
    build_objective,
    squared_errors,
    with_prior,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
INDICES = torch.tensor([0, 3, 250, 640, 999])


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents, noise, prediction), of unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(len(INDICES), 3, 4, 6, generator=generator) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_discrete_corruption_is_diffusers(tensors, prediction_type: str) -> None:
    latents, noise, _ = tensors
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction_type)
    # the pipeline's scheduler is another class, of the same betas
    objective = build_objective(EulerDiscreteScheduler(**BETAS, prediction_type=prediction_type))
    batch = objective.corrupt(latents, noise, INDICES)
    targets = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(latents, noise, INDICES),
        "sample": latents,
    }
    torch.testing.assert_close(batch.model_input, scheduler.add_noise(latents, noise, INDICES))
    torch.testing.assert_close(batch.target, targets[prediction_type])
    assert torch.equal(batch.timestep, INDICES)
    assert torch.equal(batch.weight, torch.ones(5))
    assert (objective.source.convention, objective.levels) == ("timestep", 1000)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_diffusers(tensors, prediction_type: str) -> None:
    latents, noise, _ = tensors
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction_type)
    snr = compute_snr(scheduler, INDICES)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / divisor
    batch = build_objective(scheduler, snr_gamma=5.0).corrupt(latents, noise, INDICES)
    torch.testing.assert_close(batch.weight, expected, rtol=1e-5, atol=1e-7)
    assert len(batch.weight.unique()) > 2


def test_min_snr_weights_agree_on_the_error_in_the_image(tensors) -> None:
    """An error e in x counts min(SNR, γ) |e|², whichever way the model says what it thinks of x."""
    latents, noise, error = tensors
    losses = []
    for kind in ("epsilon", "v_prediction", "sample"):
        objective = DiscreteObjective(DDPMScheduler(**BETAS, prediction_type=kind), snr_gamma=5.0)
        batch = objective.corrupt(latents, noise, INDICES)
        a = objective.alphas[INDICES].float()[:, None, None, None]
        # what each prediction becomes where the estimate of x is off by `error`, x_t being what it is
        off = {"epsilon": -(a / (1 - a)).sqrt() * error, "v_prediction": -error / (1 - a).sqrt(), "sample": error}
        losses.append(squared_errors(batch.target + off[kind], batch))
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_gives_finite_weights(tensors, kind: str) -> None:
    latents, noise, _ = tensors
    scheduler = DDPMScheduler(**BETAS, prediction_type=kind, rescale_betas_zero_snr=True)
    batch = build_objective(scheduler, snr_gamma=5.0).corrupt(latents, noise, INDICES)
    assert batch.weight.isfinite().all()
    torch.testing.assert_close(batch.model_input[-1], noise[-1], rtol=0, atol=1e-3)


def test_min_snr_with_prior_preservation(tensors) -> None:
    """Each of the 2b losses has its own timestep's weight, then the halves are added."""
    latents, noise, prediction = (torch.cat([part, 0.5 * part.flip(0)])[:8] for part in tensors)  # (8, …)
    indices = torch.tensor([5, 900, 100, 400, 700, 20, 999, 300])
    scheduler = DDPMScheduler(**BETAS)
    batch = build_objective(scheduler, snr_gamma=5.0).corrupt(latents, noise, indices)
    combined = with_prior(squared_errors(prediction, batch), 0.3)
    snr = compute_snr(scheduler, indices)
    for i in range(4):
        parts = [
            (min(snr[j].item(), 5.0) / snr[j].item()) * (prediction[j] - noise[j]).double().square().mean().item()
            for j in (i, i + 4)
        ]
        assert combined[i].item() == pytest.approx(parts[0] + 0.3 * parts[1], rel=1e-5)


def test_prior_needs_a_doubled_batch() -> None:
    with pytest.raises(ValueError, match="as many of them as instance images, got 3 in all"):
        with_prior(torch.ones(3), 1.0)


@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_loss_is_the_papers(tensors, scheduler_class, prediction_type: str, sigma_data: float) -> None:
    latents, noise, prediction = tensors
    scheduler = scheduler_class(prediction_type=prediction_type, sigma_data=sigma_data)
    objective = build_objective(scheduler)
    batch = objective.corrupt(latents, noise, INDICES)
    loss = squared_errors(prediction, batch)
    reference = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=sigma_data)
    for i, index in enumerate(INDICES.tolist()):
        sigma = reference.sigmas[1000 - index].double()
        noisy = latents[i].double() + sigma * noise[i].double()
        torch.testing.assert_close(batch.model_input[i], reference.precondition_inputs(noisy, sigma).float())
        denoised = reference.precondition_outputs(noisy, prediction[i].double(), sigma)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2  # Karras et al., table 1
        expected = weight * (denoised - latents[i].double()).square().mean()
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-4)
        # λ, as an adapter reads it from what the denoiser is given
        assert batch.timestep[i].item() == pytest.approx(0.25 * sigma.log().item(), rel=1e-5, abs=1e-6)
        level = TimestepNoise("edm").noise_level(batch.timestep[i])
        assert level.item() == pytest.approx((sigma / (1 + sigma)).item(), rel=1e-5)
    assert (objective.source.convention, objective.levels) == ("edm", 1001)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_style_with_a_discrete_schedule(tensors, prediction_type: str) -> None:
    latents, noise, prediction = tensors
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type=prediction_type)
    objective = build_objective(scheduler, edm_style=True)
    batch = objective.corrupt(latents, noise, INDICES)
    loss = squared_errors(prediction, batch)
    alphas = DDPMScheduler(**BETAS).alphas_cumprod.double()[INDICES]
    for i, a in enumerate(alphas):
        sigma = ((1 - a) / a).sqrt()
        x, f = latents[i].double(), prediction[i].double()
        noisy = x + sigma * noise[i].double()
        if prediction_type == "epsilon":
            denoised = noisy - sigma * f
        else:
            denoised = noisy / (sigma**2 + 1) - f * sigma / (sigma**2 + 1).sqrt()
        expected = (denoised - x).square().mean() / sigma**2
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(batch.model_input[i], (noisy / (sigma**2 + 1).sqrt()).float())
    assert torch.equal(batch.timestep, INDICES)
    assert objective.source.convention == "timestep"


def test_a_continuous_schedule_gives_the_denoiser_log_sigma(tensors) -> None:
    latents, noise, _ = tensors
    options = {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0}
    objective = build_objective(EulerDiscreteScheduler(**BETAS, **options))
    assert isinstance(objective, PreconditionedObjective)
    batch = objective.corrupt(latents, noise, INDICES)
    sigma = objective.sigmas[INDICES]
    torch.testing.assert_close(batch.timestep, (0.25 * sigma.log()).float())
    assert objective.source.convention == "edm"


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_flow_objective_is_the_rectified_flows(tensors, snr_gamma: float | None) -> None:
    latents, noise, prediction = tensors
    objective = build_objective(FLOW, snr_gamma=snr_gamma)
    assert isinstance(objective, FlowObjective)
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


def test_flow_sigmas_are_those_of_the_flow_scheduler(tensors) -> None:
    latents, noise, _ = tensors
    scheduler = FlowMatchEulerDiscreteScheduler()
    objective = FlowObjective()
    torch.testing.assert_close(objective.sigmas.flip(0).float(), scheduler.sigmas)
    batch = objective.corrupt(latents, noise, INDICES)
    timesteps = scheduler.timesteps.flip(0)[INDICES]
    torch.testing.assert_close(batch.timestep, timesteps)
    torch.testing.assert_close(batch.model_input, scheduler.scale_noise(latents, timesteps, noise))


def test_weights_multiply_per_sample_means(tensors) -> None:
    _, noise, prediction = tensors
    batch = Corrupted(noise, INDICES, noise.bfloat16(), torch.arange(5.0))
    losses = squared_errors(prediction.bfloat16(), batch)
    assert losses.dtype == torch.float32
    expected = [
        i * (prediction[i].bfloat16().double() - noise[i].bfloat16().double()).square().mean().item() for i in range(5)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DDPMScheduler(prediction_type="sample"), {"edm_style": True}, "prediction_type is 'sample'"),
        (DDPMScheduler(prediction_type="flow"), {}, "prediction_type is 'flow', expected one of epsilon"),
        (FLOW, {"edm_style": True}, "a rectified flow has no EDM terms: leave do_edm_style_training out"),
        (DDPMScheduler(), {"edm_style": True, "snr_gamma": 5.0}, "train without do_edm_style_training"),
        (EDMEulerScheduler(), {"snr_gamma": 5.0}, "leave snr_gamma out, or use another model"),
    ],
)
def test_refused(scheduler, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(scheduler, **options)
