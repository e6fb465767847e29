"""The forms that a timestep may have, the schedules that make it, and the timesteps that are refused, on a UNet."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor, nn

from nara_diffusion import TimestepNoise, noise_level, set_noise_source
from tests.helpers.adapted import relative_error
from tests.helpers.denoisers.adapted import UNET, WARNINGS_OF_DIFFUSERS, adapted_denoiser, run, told
from tests.helpers.denoisers.models import inputs_of, sample_of
from tests.helpers.rounding import rounding_of

pytestmark = WARNINGS_OF_DIFFUSERS


@pytest.fixture(scope="module")
def _shared_unet() -> nn.Module:
    return adapted_denoiser(UNET)


@pytest.fixture
def unet(_shared_unet: nn.Module) -> nn.Module:
    return copy.deepcopy(_shared_unet)


DTYPES = [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMS = {
    "int": 250,
    "float": 250.0,
    **{f"0-d {dtype}": torch.tensor(250, dtype=dtype) for dtype in DTYPES},
    **{f"(1,) {dtype}": torch.tensor([250], dtype=dtype) for dtype in DTYPES},
    **{f"(b,) {dtype}": torch.tensor([250, 250], dtype=dtype) for dtype in DTYPES},
}


@pytest.mark.parametrize("timestep", FORMS.values(), ids=FORMS)
def test_a_timestep_may_have_any_form(unet, timestep):
    inputs = inputs_of(UNET)
    sample, text = inputs["sample"], inputs["encoder_hidden_states"]
    output = run(unet, inputs, timestep)
    with noise_level(unet, 0.25):
        torch.testing.assert_close(output, run(unet, inputs, torch.tensor([250, 250])), rtol=1e-5, atol=1e-5)
    levels = told(unet, lambda: unet(sample, timestep, text))
    assert levels == [0.25]  # one C for all, though a timestep may come for each
    with torch.no_grad():
        assert torch.equal(unet(sample, timestep, encoder_hidden_states=text).sample, output)
        assert torch.equal(unet(timestep=timestep, encoder_hidden_states=text, sample=sample).sample, output)


def test_mixed_timesteps_equal_one_by_one(unet):
    inputs, timesteps = inputs_of(UNET, 4), torch.tensor([0, 333, 640, 999])
    batch = run(unet, inputs, timesteps)
    for i in range(4):
        alone = run(unet, sample_of(inputs, i, 4), timesteps[i])
        assert relative_error(batch[i : i + 1], alone) < rounding_of(unet)
    assert not torch.allclose(batch, run(unet, inputs, timesteps.flip(0)), atol=1e-2)


def test_the_doubled_batch_of_cfg_equals_two_runs(unet):
    inputs, timesteps = inputs_of(UNET, 4), torch.tensor([100, 800])
    halves = [{key: value[part] for key, value in inputs.items()} for part in (slice(0, 2), slice(2, 4))]
    for timestep in (torch.tensor(640), timesteps):
        both = run(unet, inputs, torch.cat([timestep, timestep]) if timestep.dim() else timestep)
        apart = torch.cat([run(unet, half, timestep) for half in halves])
        torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


def test_fractional_timesteps_and_few_steps_have_their_level(unet):
    karras = EulerDiscreteScheduler(use_karras_sigmas=True)
    karras.set_timesteps(9)
    assert (karras.timesteps != karras.timesteps.round()).any()
    lcm = LCMScheduler()
    lcm.set_timesteps(4)
    turbo = EulerDiscreteScheduler(timestep_spacing="trailing")
    turbo.set_timesteps(1)
    assert turbo.timesteps.tolist() == [999]
    for scheduler, start in ((karras, 0), (karras, 5), (lcm, 0), (turbo, 0)):  # 5: as img2img starts midway
        for t in scheduler.timesteps[start:]:
            assert told(unet, lambda t=t: run(unet, inputs_of(UNET), t)) == pytest.approx([float(t) / 1000], abs=1e-7)


def _edm(scheduler: Any) -> tuple[Tensor, Tensor]:
    scheduler.set_timesteps(8)
    return scheduler.timesteps, scheduler.sigmas[:-1]


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True),
    ],
    ids=["EDM", "continuous"],
)
def test_edm_timesteps_are_refused_until_declared(unet, scheduler):
    timesteps, sigmas = _edm(scheduler)
    assert timesteps.min() < 0
    inputs = inputs_of(UNET)
    with pytest.raises(ValueError, match=r'is no λ in \[0, 1\].*TimestepNoise\("edm"\)'):
        run(unet, inputs, timesteps.min())
    set_noise_source(unet, TimestepNoise("edm"))
    assert unet.peft_config["default"].noise_convention == "edm"  # a new adapter follows
    for timestep, sigma in zip(timesteps, sigmas, strict=True):
        level = float(sigma / (1 + sigma))
        assert told(unet, lambda t=timestep: run(unet, inputs, t)) == pytest.approx([level], abs=1e-5)
    with pytest.raises(ValueError, match=r"999.* as 'edm' is no λ"):
        run(unet, inputs, 999)


@pytest.mark.parametrize("timestep", [1001, -1, float("nan"), torch.tensor([3.0, -0.5]), torch.tensor([])])
def test_timesteps_out_of_range_raise(unet, timestep):
    with pytest.raises(ValueError, match=r"timestep (is|has shape)"):
        run(unet, inputs_of(UNET), timestep)


def test_another_number_of_training_timesteps(unet):
    set_noise_source(unet, TimestepNoise(num_train_timesteps=500))
    assert told(unet, lambda: run(unet, inputs_of(UNET), 250)) == [0.5]
    with pytest.raises(ValueError, match="is no λ"):
        run(unet, inputs_of(UNET), 999)


def test_noise_level_beats_the_timestep(unet):
    inputs = inputs_of(UNET)
    with noise_level(unet, 0.75):
        assert told(unet, lambda: run(unet, inputs, 250)) == [0.75]
        assert told(unet, lambda: run(unet, inputs, -3)) == [0.75]  # nobody reads it then
    assert told(unet, lambda: run(unet, inputs, 250)) == [0.25]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"meaning": "snr"}, "meaning is 'snr': choose one of 'discrete'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_a_source_refuses_what_it_does_not_know(options, said):
    with pytest.raises(ValueError, match=said):
        TimestepNoise(**options)
