"""ComfyUI's node reads λ from the sampling at work by its own timesteps, and refuses one whose σ tells no λ.

The samplings restate those of comfy/model_sampling.py and comfy_extras/nodes_model_advanced.py (ComfyUI a125cd84), with
the same public attributes.
"""

import math

import pytest
import torch

from tests.comfyui import conftest
from tests.comfyui.conftest import CONST, EPS, V_PREDICTION, Sampling
from tests.comfyui.test_node import FILE, ScaledFlow, call, comfy_model, inputs, saved, small

comfyui = conftest.comfyui


class Distilled(Sampling):
    """ModelSamplingDiscreteDistilled, that of LCM: 50 of the 1000 sigmas."""

    def __init__(self):
        super().__init__()
        self.sigmas = self.sigmas[19::20]

    def timestep(self, sigma):
        return 20 * super().timestep(sigma) + 19


class ContinuousEDM:
    """ModelSamplingContinuousEDM: no schedule; the thousand sigmas are for ComfyUI's schedulers alone."""

    def __init__(self):
        self.sigmas = torch.linspace(math.log(0.002), math.log(120), 1000).exp()

    def timestep(self, sigma):
        return 0.25 * sigma.log()


class DiscreteEDM(Sampling):
    """ModelSamplingDiscreteEDM: a schedule, but no timesteps of it."""

    def timestep(self, sigma):
        return 0.25 * sigma.log()


class StableCascade(Sampling):
    """StableCascadeSampling: 10 000 sigmas, and a timestep in [0, 1]."""

    num_timesteps = 10_000

    def timestep(self, sigma):
        return 1 - 2 / torch.pi * (1 / (sigma**2 + 1)).sqrt().asin()


def sampled(comfyui, kind, schedule, sigma_of, **changes):
    """The node's model, at the sampler's `sigma_of`(sampling), and the NaRA of Diffusers with its inputs."""
    pipe = saved(small(), comfyui.folder, **changes)
    x, c = inputs(pipe.unet)
    model = comfy_model(small().unet, kind, schedule)
    patched, _ = comfyui.node.LoadNaRA().load(model, FILE, "sdxl", 1.0)
    return patched.sample(x, sigma_of(model.model.model_sampling), **c), pipe.unet, x, c


@torch.no_grad()
def test_lcm_has_the_noise_level_of_its_timestep_not_of_its_fifty_sigmas(comfyui):
    found, unet, x, c = sampled(comfyui, EPS, Distilled, lambda sampling: sampling.sigmas[[0, 0, 1]])
    wanted = call(unet, x, torch.tensor([19, 19, 39]), **c)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("schedule", [ContinuousEDM, DiscreteEDM, StableCascade])
def test_a_sampling_without_timesteps_is_refused(comfyui, schedule):
    with pytest.raises(ValueError, match=rf"{schedule.__name__}.*choose the node ModelSamplingDiscrete"):
        sampled(comfyui, V_PREDICTION, schedule, lambda _: torch.tensor([0.5, 1.0, 2.0]))


@torch.no_grad()
def test_an_adapter_of_edm_is_refused_in_a_flow(comfyui):
    with pytest.raises(ValueError, match=r"σ / \(1 \+ σ\).*ScaledFlow"):
        sampled(comfyui, CONST, ScaledFlow, lambda _: torch.tensor([0.1, 0.5, 0.9]), noise_convention="edm")
