"""λ where a forward has several timesteps, none, or one that the denoiser doesn't read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_rfd4_proteina import RFD4ProteinaScheduler

from nara_diffusion import TimestepNoise
from nara_diffusion.noise.denoiser_classes import DENOISERS
from tests.helpers.adapted import nara_config, relative_error
from tests.helpers.denoisers.adapted import OTHER_TARGETS, TARGETS, WARNINGS_OF_DIFFUSERS, adapted_denoiser, run, told
from tests.helpers.denoisers.levels import ARGUMENTS, EXPECTED
from tests.helpers.denoisers.models import denoiser, inputs_of

pytestmark = WARNINGS_OF_DIFFUSERS


@pytest.mark.parametrize(
    ("video", "audio", "levels"),
    [
        ([[0.0] * 8, [0.0] * 8], [700.0, 200.0], [0.7, 0.2]),  # sound for a given video
        ([[0.0] * 4 + [400.0] * 4, [300.0] * 8], [0.0, 0.0], [0.4, 0.3]),  # a video for given sound
        ([[0.0] * 4 + [400.0] * 4, [300.0] * 8], [100.0, 900.0], [0.4, 0.9]),
    ],
)
def test_of_a_video_and_its_sound_the_noisiest_counts(video, audio, levels):
    name = "LTX2VideoTransformer3DModel"
    model, inputs = adapted_denoiser(name), inputs_of(name)
    inputs["audio_timestep"] = torch.tensor(audio)
    assert told(model, lambda: run(model, inputs, torch.tensor(video))) == pytest.approx(levels)


def test_of_the_modalities_of_cosmos_3_the_noisiest_counts():
    name = "Cosmos3OmniTransformer"
    model, inputs = adapted_denoiser(name), inputs_of(name)
    source = DENOISERS[name].source()
    for vision, sound, action, level in (
        ([300.0, 300.0], [100.0, 100.0], None, 0.3),
        ([300.0, 300.0], [800.0, 800.0], None, 0.8),
        ([], [250.0, 250.0], None, 0.25),  # a given video has no timesteps
        ([100.0], None, [600.0, 500.0], 0.6),
    ):
        timesteps = {
            f"{kind}_timesteps": None if values is None else torch.tensor(values)
            for kind, values in (("vision", vision), ("sound", sound), ("action", action))
        }
        assert source(model, (), {**inputs, **timesteps}).noise_level.tolist() == pytest.approx([level])


def test_of_backbone_and_latents_of_a_protein_the_noisier_counts():
    name = "RFD4ProteinaTransformer"
    model, inputs = adapted_denoiser(name), inputs_of(name)
    inputs["local_latents_time"] = torch.tensor([0.9, 0.25])
    backbone = torch.tensor([0.6, 0.5])
    assert told(model, lambda: run(model, inputs, backbone, "bb_ca_time")) == pytest.approx([0.4, 0.75])


def test_the_level_of_a_protein_is_the_noise_that_its_scheduler_adds():
    scheduler = RFD4ProteinaScheduler("log", "1/t", tsr_k=1.0, tsr_sigma=1.0)
    scheduler.set_timesteps(30)
    share = torch.stack([scheduler.add_noise(torch.zeros(1), torch.ones(1), t) for t in scheduler.timesteps]).flatten()
    levels = DENOISERS["RFD4ProteinaTransformer"].source().noise_level(scheduler.timesteps)
    torch.testing.assert_close(levels, share)
    assert levels[0] > 0.9 > 0.5 > levels[-1]


def test_the_reference_of_wan_animate_2_is_read_at_timestep_1_whatever_is_passed():
    name = "WanAnimate2Transformer3DModel"
    model, inputs = adapted_denoiser(name), inputs_of(name, 1)
    assert told(model, lambda: run(model, inputs, torch.tensor([900.0]))) == pytest.approx([0.9])
    reference = {**inputs, "kv_cache_mode": "extract", "offset_grid_sizes": inputs["reference_grid_sizes"]}
    assert told(model, lambda: run(model, reference, torch.tensor([900.0]))) == pytest.approx([0.001])
    first = run(model, reference, torch.tensor([900.0]))
    assert torch.equal(run(model, reference, torch.tensor([5.0])), first)  # the model itself doesn't read it


def test_packed_timesteps_are_of_one_sample():
    source = TimestepNoise("data", packed=True)
    assert source.noise_level(torch.tensor([0.2, 0.7, 1.0])).tolist() == pytest.approx([0.8])
    assert DENOISERS["MiniMaxH3Transformer3DModel"].source().noise_level(torch.tensor([0.4, 0.9])).tolist() == [
        pytest.approx(0.6)
    ]


def test_a_forward_without_any_of_its_timesteps_names_them():
    model, inputs = adapted_denoiser("Cosmos3OmniTransformer"), inputs_of("Cosmos3OmniTransformer")
    inputs = {key: value for key, value in inputs.items() if not key.endswith("_timesteps")}
    message = "got no vision_timesteps and no sound_timesteps and no action_timesteps"
    with pytest.raises(ValueError, match=message):
        DENOISERS["Cosmos3OmniTransformer"].source()(model, (), inputs)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fresh_adapter_changes_nothing_at_any_level(name):
    argument, timesteps = ARGUMENTS.get(name, "timestep"), list(EXPECTED[name])
    inputs: dict[str, Any] = inputs_of(name, 1)
    plain = denoiser(name)
    expected = [run(plain, inputs, torch.tensor([float(t)]), argument) for t in timesteps]
    model = denoiser(name)
    add = getattr(model, "add_adapter", None)
    config = nara_config(target_modules=OTHER_TARGETS.get(name, TARGETS))
    if add is None:
        model = adapted_denoiser(name, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".lora_B." in key:
                    parameter.zero_()
    else:
        add(config)
    for timestep, output in zip(timesteps, expected, strict=True):
        assert relative_error(run(model, inputs, torch.tensor([float(timestep)]), argument), output) < 1e-5
