"""A LoRA of a converted model says which scheduler it needs, and keeps it wherever its file has a place for it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from nara_diffusion import from_lora, noise_level, to_lora
from nara_diffusion.export import save_host_file
from nara_diffusion.loaders.schedulers import scheduler_fields
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import trained

LEVEL = 0.37
KINDS: dict[str, Any] = {
    "v": (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}, "timestep", "zsnr False"),
    "flow": (
        diffusers.DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        "flow",
        "ModelSamplingSD3 (shift 1.0)",
    ),
}


def converted(kind: str, **changes: Any) -> Any:
    """A pipeline with a NaRA "toy" that converts it, and with the scheduler that belongs to it."""
    pipe = small_sdxl()
    scheduler, changes_of_scheduler, convention, _ = KINDS[kind]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **changes_of_scheduler)
    fields = scheduler_fields(pipe.scheduler)
    options = {"noise_convention": convention, "target_modules": ["to_q", "to_v", "conv1"], "scheduler": fields}
    return trained(pipe, name="toy", text=False, **options | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_draws_the_naras_pixels_with_the_scheduler_that_the_warning_names(kind, tmp_path, caplog):
    pipe = converted(kind)
    with noise_level(pipe.unet, LEVEL):
        wanted = pixels(pipe)
    with caplog.at_level(logging.WARNING):
        lora = to_lora(pipe.unet, LEVEL, "toy")
    (warning,) = [record.getMessage() for record in caplog.records if "scheduler" in record.getMessage()]
    assert KINDS[kind][-1] in warning
    save_host_file({"unet": lora}, tmp_path / "lora.safetensors", "kohya", "sdxl", 1)
    other = small_sdxl()
    other.load_lora_weights(tmp_path / "lora.safetensors")
    assert (pixels(other) - wanted).abs().max() > 0.05  # by the base's own scheduler
    line = re.search(r"pipe\.scheduler = .*?\)(?=[,;])", warning)[0]  # type: ignore[index]
    exec(line, {"pipe": other, **vars(diffusers)})
    torch.testing.assert_close(pixels(other), wanted, rtol=0, atol=rounding_of(pipe.unet))


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_from_lora_brings_the_scheduler_along(form, tmp_path: Path):
    pipe = converted("flow")
    lora, source = to_lora(pipe.unet, LEVEL, "toy"), tmp_path
    if form == "peft":
        lora.save_pretrained(tmp_path)
    else:
        source = tmp_path / "lora.safetensors"
        save_host_file({"unet": lora}, source, "kohya", "sdxl", 1)
    other = from_lora(source, small_sdxl())
    config = other.unet.peft_config["default"]
    assert config.scheduler == scheduler_fields(pipe.scheduler) == scheduler_fields(other.scheduler)
    assert config.noise_convention == "flow"
    with noise_level(pipe.unet, LEVEL):
        torch.testing.assert_close(pixels(other), pixels(pipe), rtol=0, atol=rounding_of(pipe.unet))
