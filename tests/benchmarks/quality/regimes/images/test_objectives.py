"""What a converted model is asked for, against the formulas by hand in float64."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from quality.regimes.images.data import base_pipeline
from quality.regimes.images.objectives import build_conversion

INDICES = torch.tensor([0, 1, 250, 503, 998, 999])


def alphas_bar() -> torch.Tensor:
    """SDXL's schedule, (1000,) float64: √β is linear."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def corrupted(name: str):
    x, noise = torch.randn(2, len(INDICES), 4, 5, 3)
    batch = build_conversion(name, base_pipeline().scheduler).corrupt(x, noise, INDICES)
    return batch, x.double(), noise.double()


def column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["eps", "eps_to_v", "zero_snr"])
def test_conversion_on_a_discrete_schedule_is_the_formula(name):
    batch, x, noise = corrupted(name)
    root = alphas_bar().sqrt()
    if name == "zero_snr":  # arXiv 2305.08891, algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    signal, sigma = column(root[INDICES]), column((1 - root[INDICES] ** 2).sqrt())
    assert_same(batch.model_input, signal * x + sigma * noise)
    assert_same(batch.target, noise if name == "eps" else signal * noise - sigma * x)
    assert torch.equal(batch.timestep, INDICES)
    assert torch.equal(batch.weight, torch.ones(len(INDICES)))


def test_zero_snr_asks_for_the_picture_from_pure_noise():
    batch, x, noise = corrupted("zero_snr")
    assert_same(batch.model_input[-1], noise[-1])
    assert_same(batch.target[-1], -x[-1])


def test_flow_is_the_formula_at_the_schedulers_sigmas():
    batch, x, noise = corrupted("eps_to_flow")
    scheduler = FlowMatchEulerDiscreteScheduler()
    sigmas = scheduler.sigmas.double().flip(0)[INDICES]  # the scheduler goes from noise to data
    assert_same(batch.model_input, (1 - column(sigmas)) * x + column(sigmas) * noise)
    assert_same(batch.target, noise - x)
    assert (batch.timestep.double() - scheduler.timesteps.double().flip(0)[INDICES]).abs().max() < 1e-3
    assert torch.equal(batch.weight, torch.ones(len(INDICES)))


def test_build_conversion_of_an_unknown_name_raises():
    with pytest.raises(ValueError, match="objective is 'edm', expected one of eps, eps_to_v, eps_to_flow, zero_snr"):
        build_conversion("edm", base_pipeline().scheduler)
