"""The identity against float64 formulas: disturbed schedules, b unequal timesteps, x̂ and ε̂ of every kind of base."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from nara_diffusion.dreambooth.objectives import Objective, build_objective
from nara_diffusion.dreambooth.objectives.conversion import converted_scheduler
from nara_diffusion.dreambooth.objectives.identity import IdentityReading

LEVELS = 60
SHAPE = (3, 4, 6)
Tensor = torch.Tensor


def irregular_betas() -> list[float]:
    """Of no formula, so that a wrong timestep or another schedule shows."""
    draws = torch.rand(LEVELS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (0.002 + 0.08 * torch.linspace(0, 1, LEVELS, dtype=torch.float64) + 0.04 * draws).tolist()


def base_scheduler(kind: str) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(num_train_timesteps=LEVELS, trained_betas=irregular_betas(), prediction_type=kind)


def base_alphas() -> Tensor:
    """ᾱ (N,) float64, by hand."""
    return (1 - torch.tensor(irregular_betas(), dtype=torch.float64)).cumprod(0)


def clean_and_noise(count: int) -> tuple[Tensor, Tensor]:
    x, eps = torch.randn(2, count, *SHAPE, generator=torch.Generator().manual_seed(3)).unbind(0)
    return x, eps


def said_by_base(kind: str, root: Tensor, sigma: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """What a base that knows x and ε says, at √ᾱ and √(1 − ᾱ)."""
    return {"epsilon": eps, "v_prediction": root * eps - sigma * x, "sample": x}[kind]


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow_prediction"])
def test_identity_of_exact_predictions_is_exact(kind: str, target: str) -> None:
    """Whatever form the base's knowledge of x and ε has, the reading is the objective's own target."""
    base = base_scheduler(kind)
    objective = build_objective(converted_scheduler(base, target, False))
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
    said = said_by_base(kind, column(root), column(noise), x.double(), eps.double()).float()
    torch.testing.assert_close(reading.prediction(batch.model_input, said, indices), batch.target, rtol=1e-5, atol=2e-5)


def test_v_of_an_epsilon_base_is_the_formula_of_the_paper_for_any_prediction() -> None:
    """v̂ = (ε̂ − √(1 − ᾱ) x_t) / √ᾱ in float64, and its gradient in ε̂ is 1 / √ᾱ."""
    base = base_scheduler("epsilon")
    objective = build_objective(converted_scheduler(base, "v_prediction", False))
    reading = IdentityReading(base, objective)
    indices = torch.tensor([59, 0, 31, 8, 31])
    x, eps = clean_and_noise(len(indices))
    seen = objective.corrupt(x, eps, indices).model_input
    said = torch.randn(len(indices), *SHAPE, requires_grad=True)
    alphas = column(base_alphas()[indices])
    expected = (said.double() - (1 - alphas).sqrt() * seen.double()) / alphas.sqrt()
    read = reading.prediction(seen, said, indices)
    torch.testing.assert_close(read.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(read.sum(), said)
    torch.testing.assert_close(gradient.double(), alphas.rsqrt().expand_as(gradient), rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_takes_the_timestep_of_as_much_noise_and_is_clamped_at_the_end() -> None:
    base = base_scheduler("epsilon")
    objective: Any = build_objective(converted_scheduler(base, "v_prediction", True))
    reading = IdentityReading(base, objective)
    rescaled, alphas = objective.alphas, base_alphas()
    outside = rescaled < alphas[-1] * (1 - 1e-6)
    assert 1 <= outside.sum() < LEVELS / 2
    assert reading.clamped.tolist() == outside.tolist()
    angle, base_angle = rescaled.sqrt().acos(), alphas.sqrt().acos()
    assert reading.timesteps.tolist() == (angle[:, None] - base_angle).abs().argmin(1).tolist()
    assert reading.timesteps[outside].unique().tolist() == [LEVELS - 1]
    assert reading.timesteps[20] != 20  # rescaling moved the noise

    indices = torch.tensor([59, 20, 58, 3])
    x, eps = clean_and_noise(len(indices))
    batch = objective.corrupt(x, eps, indices)
    a, seen, said = column(rescaled[indices]), batch.model_input.double(), torch.randn(len(indices), *SHAPE)
    known = torch.maximum(a, alphas[-1])
    estimate = (seen - (1 - known).sqrt() * said.double()) / known.sqrt()
    expected = a.sqrt() * said.double() - (1 - a).sqrt() * estimate
    read = reading.prediction(batch.model_input, said, indices)
    torch.testing.assert_close(read.double(), expected, rtol=2e-4, atol=2e-4)


def test_bf16_prediction_is_read_in_float32() -> None:
    base = base_scheduler("epsilon")
    objective = build_objective(converted_scheduler(base, "v_prediction", False))
    reading = IdentityReading(base, objective)
    indices = torch.tensor([59, 2, 40])
    x, eps = clean_and_noise(len(indices))
    seen, said = objective.corrupt(x, eps, indices).model_input, eps.bfloat16()
    read = reading.prediction(seen, said, indices)
    assert read.dtype == torch.float32
    alphas = column(base_alphas()[indices])
    expected = (said.double() - (1 - alphas).sqrt() * seen.double()) / alphas.sqrt()
    torch.testing.assert_close(read.double(), expected, rtol=1e-5, atol=1e-5)


def test_epsilon_base_with_a_level_of_pure_noise_is_read_at_the_last_level_that_has_an_image() -> None:
    base = DDPMScheduler(num_train_timesteps=LEVELS, rescale_betas_zero_snr=True)
    objective: Objective = build_objective(converted_scheduler(base, "v_prediction", True))
    reading = IdentityReading(base, objective)
    assert reading.timesteps.tolist() == [*range(LEVELS - 1), LEVELS - 2]
    assert reading.clamped.nonzero().flatten().tolist() == [LEVELS - 1]
