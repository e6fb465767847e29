"""The reading of a base's prediction as another one: exact where the base knows x and ε, clamped elsewhere."""

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from identity_reading import IdentityReading
from torch import Tensor

from nara_diffusion.dreambooth.objectives import build_objective

LEVELS = 60
SHAPE = (3, 4, 6)


def irregular_betas() -> list[float]:
    """Of no formula, so that a wrong timestep or another schedule shows."""
    draws = torch.rand(LEVELS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (0.002 + 0.08 * torch.linspace(0, 1, LEVELS, dtype=torch.float64) + 0.04 * draws).tolist()


def base_scheduler(kind: str = "epsilon", **options: bool) -> EulerDiscreteScheduler:
    settings = {"num_train_timesteps": LEVELS, "trained_betas": irregular_betas()}
    return EulerDiscreteScheduler(**settings, prediction_type=kind, **options)


def base_alphas() -> Tensor:
    """ᾱ (N,) float64, by hand."""
    return (1 - torch.tensor(irregular_betas(), dtype=torch.float64)).cumprod(0)


def clean_and_noise(count: int) -> tuple[Tensor, Tensor]:
    x, eps = torch.randn(2, count, *SHAPE, generator=torch.Generator().manual_seed(3)).unbind(0)
    return x, eps


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("epsilon", "flow_prediction"),
        ("v_prediction", "epsilon"),
        ("v_prediction", "flow_prediction"),
        ("sample", "v_prediction"),
    ],
)
def test_identity_of_exact_predictions_is_exact(kind: str, target: str) -> None:
    """Whatever form the base's knowledge of x and ε has, the reading is the objective's own target."""
    base = base_scheduler(kind)
    target_scheduler = (
        FlowMatchEulerDiscreteScheduler(LEVELS) if target == "flow_prediction" else base_scheduler(target)
    )
    objective = build_objective(target_scheduler)
    reading = IdentityReading(base, objective)
    indices = (~reading.clamped).nonzero()[:, 0][[0, 7, 3, -1]]
    x, eps = clean_and_noise(len(indices))
    batch = objective.corrupt(x, eps, indices)
    sample, timestep = reading.base_inputs(batch.model_input, indices)
    if target == "flow_prediction":
        sigma = (indices + 1).double() / LEVELS
        norm = ((1 - sigma) ** 2 + sigma**2).sqrt()
        root, noise = (1 - sigma) / norm, sigma / norm
        distance = (root[:, None] - base_alphas().sqrt()).abs()
        reached = distance.gather(1, timestep[:, None])[:, 0]
        assert (reached <= 1.6 * distance.amin(1)).all()  # nearest in φ: of two neighbours, not always that in cos φ
        torch.testing.assert_close(sample.double(), batch.model_input.double() / column(norm), rtol=1e-6, atol=1e-6)
    else:
        root, noise = base_alphas()[indices].sqrt(), (1 - base_alphas()[indices]).sqrt()
        assert timestep.tolist() == indices.tolist()
        torch.testing.assert_close(sample, batch.model_input)
    answers = {"epsilon": eps, "v_prediction": column(root) * eps - column(noise) * x, "sample": x}
    read = reading.prediction(batch.model_input, answers[kind].float(), indices)
    torch.testing.assert_close(read, batch.target, rtol=1e-5, atol=2e-5)


def test_zero_terminal_snr_takes_the_matching_timestep() -> None:
    base = base_scheduler()
    objective = build_objective(base_scheduler("v_prediction", rescale_betas_zero_snr=True))
    reading = IdentityReading(base, objective)
    rescaled, alphas = objective.p**2, base_alphas()
    outside = rescaled < alphas[-1] * (1 - 1e-6)
    assert 1 <= outside.sum() < LEVELS / 2
    assert reading.clamped.tolist() == outside.tolist()
    angle, base_angle = rescaled.sqrt().acos(), alphas.sqrt().acos()
    assert reading.timesteps.tolist() == (angle[:, None] - base_angle).abs().argmin(1).tolist()
    assert reading.timesteps[20] != 20  # rescaling moved the noise

    indices = torch.tensor([59, 20, 58, 3])
    batch = objective.corrupt(*clean_and_noise(len(indices)), indices)
    a, seen, answer = column(rescaled[indices]), batch.model_input.double(), torch.randn(len(indices), *SHAPE)
    clamped = torch.maximum(a, alphas[-1])
    estimate = (seen - (1 - clamped).sqrt() * answer.double()) / clamped.sqrt()
    expected = a.sqrt() * answer.double() - (1 - a).sqrt() * estimate
    read = reading.prediction(batch.model_input, answer, indices)
    torch.testing.assert_close(read.double(), expected, rtol=2e-4, atol=2e-4)


def test_epsilon_base_at_pure_noise_uses_last_level() -> None:
    base = DDPMScheduler(num_train_timesteps=LEVELS, rescale_betas_zero_snr=True)
    target_scheduler = DDPMScheduler.from_config(base.config, prediction_type="v_prediction")
    reading = IdentityReading(base, build_objective(target_scheduler))
    assert reading.timesteps.tolist() == [*range(LEVELS - 1), LEVELS - 2]
    assert reading.clamped.nonzero().flatten().tolist() == [LEVELS - 1]
