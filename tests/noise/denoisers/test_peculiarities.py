"""Denoisers whose timestep is scaled, given for a part of the tokens, or shared by the frames of a video."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from packaging.version import Version

from nara_diffusion import noise_level
from nara_diffusion.noise.denoisers.lookup import _DENOISERS
from tests.helpers.adapted import nara_config
from tests.helpers.denoisers.adapted import TARGETS, WARNINGS_OF_DIFFUSERS, adapted_denoiser, run, told
from tests.helpers.denoisers.models import inputs_of, sample_of

pytestmark = WARNINGS_OF_DIFFUSERS


def test_the_timestep_of_cogview4_is_not_its_sigma():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    timesteps = torch.linspace(1000, 1, 5).long().float()
    scheduler.set_timesteps(timesteps=timesteps.tolist(), sigmas=(timesteps / 1000).tolist(), mu=0.5)  # its pipeline
    levels = _DENOISERS["CogView4Transformer2DModel"].source().noise_level(scheduler.timesteps)
    if Version(diffusers.__version__) < Version("0.42"):  # the last for Python 3.10, whose scheduler passes σ instead
        torch.testing.assert_close(levels, scheduler.sigmas[:-1])
        return
    torch.testing.assert_close(levels, timesteps / 1000)
    assert (scheduler.sigmas[1:-1] - levels[1:]).abs().max() > 0.05  # so λ is the timestep's, not the flow's


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001, 0.3])
def test_sana_scales_its_timestep(timestep_scale):
    model = adapted_denoiser("SanaTransformer2DModel", timestep_scale=timestep_scale)
    timesteps, inputs = torch.tensor([0.0, 250.0, 1000.0]) * timestep_scale, inputs_of("SanaTransformer2DModel", 3)
    assert told(model, lambda: run(model, inputs, timesteps)) == pytest.approx([0.0, 0.25, 1.0], abs=1e-6)
    if timestep_scale < 1:
        with pytest.raises(ValueError, match="is no λ"):
            run(model, inputs, timesteps / timestep_scale)


def test_sana_sprint_is_given_sigma_itself():
    model = adapted_denoiser("SanaTransformer2DModel", guidance_embeds=True)
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    timesteps = scheduler.timesteps[:-1]
    sigma = torch.sin(timesteps) / (torch.cos(timesteps) + torch.sin(timesteps))  # its pipeline
    assert sigma[0] > 1  # by rounding: the scheduler starts a little beyond π / 2
    inputs = {**inputs_of("SanaTransformer2DModel"), "guidance": torch.full((2,), 0.45)}
    levels = told(model, lambda: run(model, inputs, sigma))
    assert levels[0] == 1
    assert levels == pytest.approx(sigma.tolist(), abs=1e-5)
    assert 0.7 < levels[1] < 0.9


def test_cosmos_1_is_given_the_edm_noise_and_cosmos_2_the_sigma_of_a_flow():
    first = adapted_denoiser("CosmosTransformer3DModel", extra_pos_embed_type="learnable")
    second = adapted_denoiser("CosmosTransformer3DModel")
    assert first.peft_config["default"].noise_convention == "edm"
    assert second.peft_config["default"].noise_convention == "flow"
    sigma = torch.tensor([0.002, 1.0, 80.0])
    inputs = inputs_of("CosmosTransformer3DModel", 3)
    expected = pytest.approx((sigma / (1 + sigma)).tolist(), abs=1e-6)
    assert told(first, lambda: run(first, {**inputs, "fps": 24}, 0.25 * sigma.log())) == expected
    assert told(second, lambda: run(second, inputs, sigma / (sigma + 1))) == expected
    with pytest.raises(ValueError, match="is no λ"):
        run(second, inputs, 0.25 * sigma.log())


def test_frames_given_to_cosmos_2_have_no_say():
    model, inputs = adapted_denoiser("CosmosTransformer3DModel"), inputs_of("CosmosTransformer3DModel")
    given = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1)  # the first frame
    sigma = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1, 1)
    timestep = given * 0.0001 + (1 - given) * sigma  # (b, 1, frames, 1, 1), as its pipeline makes it
    mask = torch.zeros(2, 1, 2, 4, 4)
    inputs = {**inputs, "hidden_states": inputs["hidden_states"][:, :3], "condition_mask": mask}
    assert told(model, lambda: run(model, inputs, timestep)) == pytest.approx([0.3, 0.8])


def test_tokens_given_to_wan_and_ltx_have_no_say():
    wan, ltx = adapted_denoiser("WanTransformer3DModel"), adapted_denoiser("LTXVideoTransformer3DModel")
    timestep = torch.tensor([[0.0] * 4 + [250.0] * 4, [0.0] * 4 + [750.0] * 4])  # (b, seq); the first frame is given
    for model, name in ((wan, "WanTransformer3DModel"), (ltx, "LTXVideoTransformer3DModel")):
        inputs = inputs_of(name)
        assert told(model, lambda m=model, x=inputs: run(m, x, timestep)) == [0.25, 0.75]
        output = run(model, inputs, timestep)
        with noise_level(model, torch.tensor([0.25, 0.75])):
            assert torch.equal(run(model, inputs, timestep), output)


# ---------------------------------------------------------------------- videos in a UNet

VIDEO_TARGETS = [*TARGETS, "attentions.0.proj_in", "time_emb_proj", "resnets.0.conv1", "linear_2", "conv4.3"]


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("name", ["UNetMotionModel", "UNet3DConditionModel"])
def test_each_video_of_a_batch_has_its_level_in_spatial_and_temporal_layers(name, use_dora):
    config = nara_config(target_modules=VIDEO_TARGETS, use_dora=use_dora)
    model, inputs, timesteps = adapted_denoiser(name, config), inputs_of(name, 3), torch.tensor([50, 500, 950])
    adapted_names = {key for key, _ in model.named_modules() if key.endswith(".lora_A")}
    temporal = {key for key in adapted_names if "motion" in key or "temp_" in key}
    assert temporal
    assert adapted_names - temporal
    batch = run(model, inputs, timesteps)
    for i in range(3):
        expected = run(model, sample_of(inputs, i, 3), timesteps[i])
        torch.testing.assert_close(batch[i : i + 1], expected, rtol=1e-4, atol=1e-4)
    with noise_level(model, 0.5):
        assert not torch.allclose(batch, run(model, inputs, timesteps), atol=1e-2)
    for length in (2, 6, 12):  # of which some divide or equal the rows inside
        with (
            noise_level(model, torch.rand(length)),
            pytest.raises(ValueError, match=rf"{length} values, .* batch is 3"),
        ):
            run(model, inputs, timesteps)
    clone = copy.deepcopy(model)
    assert torch.equal(run(clone, inputs, timesteps), batch)
    with noise_level(clone, torch.rand(2)), pytest.raises(ValueError, match="batch is 3"):
        run(clone, inputs, timesteps)
