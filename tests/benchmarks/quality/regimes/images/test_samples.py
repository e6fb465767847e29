"""Samples of a converted model come from the scheduler that belongs to what it says."""

import pytest
import torch
from quality.regimes.images.conversion import Conversion
from quality.regimes.images.data import base_pipeline
from quality.regimes.images.objectives import CONVERSIONS, build_conversion
from quality.regimes.images.samples import STEPS, agreement, sampled, sampling_scheduler
from quality.regimes.methods import arm_arguments, build

from tests.helpers.adapted import disturb


def walked(name: str, steps: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Where sampling from noise ends with a denoiser that knows the picture x exactly, and x."""
    scheduler = sampling_scheduler(name, base_pipeline().scheduler)
    objective = build_conversion(name, base_pipeline().scheduler)
    x = torch.randn(1, 4, 5, 3)
    sigmas = [1 - step / steps for step in range(steps)]
    scheduler.set_timesteps(**({"sigmas": sigmas} if name == "eps_to_flow" else {"num_inference_steps": steps}))
    state = torch.randn(1, 4, 5, 3) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(state, timestep)
        if name == "eps_to_flow":
            sigma = float(timestep) / 1000
            said = (seen - (1 - sigma) * x) / sigma - x
        else:
            alpha = objective.alphas[int(timestep)].float()  # ᾱ
            noise = (seen - alpha.sqrt() * x) / (1 - alpha).sqrt()
            said = noise if name == "eps" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        state = scheduler.step(said, timestep, state).prev_sample
    return state, x


@pytest.mark.parametrize("name", ["eps", *CONVERSIONS])
def test_sampling_of_a_model_that_knows_the_picture_ends_there(name):
    found, picture = walked(name)
    assert (found - picture).abs().max() < 2e-3


def test_zero_snr_sampling_begins_at_pure_noise():
    scheduler = sampling_scheduler("zero_snr", base_pipeline().scheduler)
    scheduler.set_timesteps(STEPS)
    assert int(scheduler.timesteps[0]) == 999


def test_agreement_is_of_each_sample_with_its_own_prompt():
    cosines = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.4], [0.0, 0.1, 0.6]])
    assert agreement(cosines) == {"alignment": pytest.approx(0.6), "retrieval": pytest.approx(2 / 3)}


@pytest.mark.parametrize("name", ["eps_to_flow", "zero_snr"])
def test_samples_of_an_adapter_read_the_noise_level_of_their_scheduler(name):
    unet = build("nara", arm_arguments("nara", targets="attention", rank=2, steps=2, seed=0)).eval()
    disturb(unet)
    seen = []
    unet.register_forward_pre_hook(lambda module, given: seen.append(float(given[1])))
    found = sampled(base_pipeline(), unet, name, "toy", seed=3)
    assert set(found) == {"alignment", "retrieval", "similarity"}
    assert len(seen) == STEPS
    expected = [1000 - 1000 * step / STEPS for step in range(STEPS)]
    tolerance = 1e-2 if name == "eps_to_flow" else 2
    assert seen == pytest.approx(expected, abs=tolerance)


def test_samples_of_the_base_are_drawn_with_its_own_scheduler(data, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "quality.regimes.images.conversion.sampled",
        lambda *given: drawn.append(given[2:]) or dict.fromkeys(("alignment", "retrieval")),
    )
    regime = Conversion("eps_to_v", lambda: data)
    regime.sampled(None, 7, trained=False)
    regime.sampled(None, 7)
    assert drawn == [("eps", "toy", 7), ("eps_to_v", "toy", 7)]
