"""A run of --distill_to: what it writes and resumes, what it refuses, and its warning."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors import safe_open

from nara_diffusion import to_lora
from nara_diffusion.dreambooth import distill, few_steps
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.loaders.file import AdapterFile
from nara_diffusion.tuner.usage import FewStepSampling
from tests.acceptance._commands import results, run, tensors
from tests.acceptance._runs import COMMON
from tests.helpers.small_pipelines import BETAS, pixels, small_sd3, small_sdxl

LINE = (
    "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing='trailing', clip_sample=False)"
)
SAMPLED: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
TEACHER: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
PROMPTS = ["a photo of toy", "red cube on grass", "a toy"]
SHORT: dict[str, Any] = {"trajectories": 4, "max_train_steps": 4, "checkpointing_steps": None}


def flags_of(folder: Path, pipe: Any) -> dict[str, Any]:
    pipe.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return COMMON | {
        "pretrained_model_name_or_path": folder / "model",
        "distill_to": 2,
        "prompts_file": folder / "prompts.txt",
        "trajectories": 8,
        "adapter": "nara",
        "resolution": 16,
        "train_batch_size": 4,
        "num_validation_images": 1,
        **TEACHER,
        "curve_points": 10,
        "similarity_model": None,
        "alignment_model": None,
    }


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return flags_of(tmp_path_factory.mktemp("distill"), small_sdxl())


@pytest.fixture(scope="module")
def ended(sdxl: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "out"
    run("dreambooth_sdxl.py", **sdxl, output_dir=folder)
    return folder


def test_run_learns_and_writes_its_files(ended: Path) -> None:
    figures = results(ended)
    assert figures["curve_before"] == pytest.approx([1, 1], rel=1e-5)
    assert figures["validation_loss_after"] < figures["validation_loss_before"]
    card = (ended / "README.md").read_text()
    assert LINE in card
    assert "num_inference_steps=2" in card
    assert "guidance_scale=1.0" in card
    for when in ("teacher", "before", "after"):
        assert len(list((ended / f"samples-{when}").glob("*.png"))) == 3
    assert (ended / "samples.png").is_file()


def test_file_has_steps_timesteps_and_guidance(ended: Path) -> None:
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(2)
    config = AdapterFile.read(ended).parts["unet"].config
    expected = {**SAMPLED, "timesteps": scheduler.timesteps.tolist(), "timestep_spacing": "trailing", "scheduler": LINE}
    assert {name: config.few_steps[name] for name in expected} == expected
    assert config.noise_level_per == "sample"


@pytest.mark.parametrize(("when", "call"), [("before", SAMPLED), ("teacher", TEACHER)])
def test_samples_are_those_of_the_card_s_sampler(
    sdxl: dict[str, Any], ended: Path, when: str, call: dict[str, Any]
) -> None:
    pipe = DiffusionPipeline.from_pretrained(sdxl["pretrained_model_name_or_path"])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(0) for _ in PROMPTS]
    images = pipe(PROMPTS, generator=generators, height=16, width=16, **call).images
    for number, image in enumerate(images):
        actual = np.asarray(Image.open(ended / f"samples-{when}" / f"{number:02d}-seed-0.png")).astype(int)
        assert abs(actual - np.asarray(image).astype(int)).max() <= 1


def test_killed_run_resumes_without_teacher_to_same_bits(
    sdxl: dict[str, Any], ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_steps, "save_file", None)  # nothing is made again
    shutil.copytree(ended, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    run("dreambooth_sdxl.py", **sdxl, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    torch.testing.assert_close(tensors(tmp_path / "out"), tensors(ended), rtol=0, atol=0)


@pytest.mark.slow
def test_flow_is_taught_too(tmp_path: Path) -> None:
    flags = flags_of(tmp_path, small_sd3()) | SHORT | {"adapter": "nara", "learning_rate": 3e-2}
    flags |= {"target_modules": "all-linear"}
    run("dreambooth.py", **flags, output_dir=tmp_path / "out")
    figures = results(tmp_path / "out")
    assert figures["validation_loss_after"] < 1
    card = (tmp_path / "out" / "README.md").read_text()
    line = "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=0.75)"
    assert "from diffusers import FlowMatchEulerDiscreteScheduler" in card
    assert line in card

    pipe = small_sd3()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_nara_weights(tmp_path / "out")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels(pipe, **SAMPLED)
    (text,) = [str(warning.message) for warning in caught if "trained to sample" in str(warning.message)]
    assert "the pipeline uses FlowMatchEulerDiscreteScheduler with other timesteps" in text
    assert line in text

    fresh = small_sd3()
    fresh.load_nara_weights(tmp_path / "out")
    exec(line, {"pipe": fresh, "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler})
    call = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
    embeds = dict(zip(call, fresh.encode_prompt("a toy", None, None)[::2], strict=True))
    inputs = {call[name]: value for name, value in embeds.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        latents = torch.randn(1, fresh.transformer.config.in_channels, 4, 4)
        fresh.transformer(latents, timestep=torch.tensor([500.0]), **inputs)  # by hand, before any call of the pipeline
        pixels(fresh, **SAMPLED)


def test_pipeline_that_samples_otherwise_is_warned_once(sdxl: dict[str, Any], ended: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sdxl["pretrained_model_name_or_path"])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_nara_weights(ended)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            pixels(pipe, guidance_scale=4.0, num_inference_steps=3)
    (text,) = [str(warning.message) for warning in caught if "trained to sample" in str(warning.message)]
    assert "3 steps, guidance_scale 4, EulerDiscreteScheduler with other timesteps" in text
    assert LINE in text
    assert "num_inference_steps=2, guidance_scale=1" in text
    pipe.unload_nara_weights()
    pipe.load_nara_weights(ended)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pixels(pipe, **SAMPLED)


def test_lora_of_one_level_is_refused_for_cores(sdxl: dict[str, Any], ended: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sdxl["pretrained_model_name_or_path"])
    pipe.load_nara_weights(ended, adapter_name="fast")
    with pytest.raises(ValueError, match="samples in 2 steps, and its update differs from step to step"):
        to_lora(pipe.unet, 0.4, "fast")
    with safe_open(ended / "pytorch_nara_weights.safetensors", "pt") as file:
        assert "few_steps" in str(file.metadata())


@pytest.mark.slow
def test_other_levels_make_other_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = flags_of(tmp_path, small_sd3()) | {"max_train_steps": 1, "adapter": "lora", "target_modules": ["to_k"]}
    flags |= {"trajectories": 10, "trajectories_dir": str(tmp_path / "kept")}
    run("dreambooth.py", **flags, output_dir=tmp_path / "0")
    earlier = FlowMatchEulerDiscreteScheduler()  # the levels of an earlier version
    monkeypatch.setattr(distill, "student_sampler", lambda *_: (earlier, FewStepSampling(2)))
    run("dreambooth.py", **flags, output_dir=tmp_path / "1")
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_to": 9}, "from 1 to 8"),
        ({"distill_to": 4}, "a multiple of the student's, such as 8"),
        ({"distill_to": 6}, "such as 12"),
        ({"prompts_file": None}, "needs prompts"),
        ({"instance_data_dir": "pictures"}, "instance_data_dir is pictures, but distill_to"),
        ({"snr_gamma": 5.0}, "snr_gamma is 5"),
        ({"trajectories": 1}, "trajectories must be at least 2"),
        ({"curve_points": 9}, "curve_points is 9"),
        ({"flow_shift": 2.0}, "flow_shift is 2"),
        ({"class_prompt": "a toy"}, "add class_prompt to it"),
        ({"init_adapter": "mine"}, "init_adapter is mine, but distill_to"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    flags = {"pretrained_model_name_or_path": "model", "distill_to": 2, "prompts_file": "p", "num_inference_steps": 6}
    with pytest.raises(ValueError, match=message):
        DreamBoothArguments(**flags | changes)


@pytest.mark.slow
def test_shipped_run_comes_nearer_to_the_teacher(tmp_path: Path) -> None:
    run("dreambooth_sdxl.py", distill_to=4, output_dir=tmp_path / "out")
    figures = results(tmp_path / "out")
    assert figures["adapter"] == "dora"
    assert figures["validation_loss_after"] < 0.45
    assert figures["similarity_after"] > 0.95 > figures["similarity_before"]
    assert figures["text_alignment_after"] > figures["text_alignment_before"]
