"""Whole pipelines of flow models: λ is the σ of their scheduler at each step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, latents, watch
from tests.helpers.pipelines.wan import small_wan, wan_latents
from tests.helpers.small_pipelines import small_flux, small_sd3

TARGETS = [*ATTENTION, "add_k_proj", "proj_mlp", "linear_1"]


def sigma_of(timestep: Any) -> float:
    return float(torch.as_tensor(timestep).double().unique())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_stable_diffusion_3(guidance_scale):
    pipe = small_sd3()
    model, plain = adapt(pipe.transformer, TARGETS)
    errors, levels = compare_calls(model, plain), watch(model)
    latents(pipe, ["a toy", "red"], num_images_per_prompt=2, num_inference_steps=4, guidance_scale=guidance_scale)
    pipe.scheduler.set_timesteps(4)
    assert levels == [[pytest.approx(float(sigma), abs=1e-6)] for sigma in pipe.scheduler.sigmas[:4]]
    assert max(errors) < ROUNDING


def test_guidance_by_skipped_layers():
    """A further forward a step, of a part of the batch, without some of its blocks."""
    pipe = small_sd3()
    model, plain = adapt(pipe.transformer, TARGETS)
    errors, levels = compare_calls(model, plain), watch(model)
    skipping = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    latents(pipe, ["a toy", "red"], num_inference_steps=4, skip_guidance_layers=[0], **skipping)
    assert len(levels) == 7
    assert max(errors) < ROUNDING


@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_flux(true_cfg_scale):
    """With distilled guidance, and with a second forward a step for a negative prompt."""
    pipe = small_flux()
    model, plain = adapt(pipe.transformer, TARGETS)
    errors, levels = compare_calls(model, plain, level=sigma_of), watch(model)
    call = {"negative_prompt": "red", "true_cfg_scale": true_cfg_scale} if true_cfg_scale > 1 else {}
    latents(pipe, num_images_per_prompt=2, num_inference_steps=4, **call)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:4] for _ in range(2 if call else 1)]
    assert levels == [[pytest.approx(sigma, abs=1e-6)] for sigma in sigmas]
    assert max(errors) < ROUNDING


def test_flux_that_starts_midway():
    stock = small_flux()
    parts = {
        name: value for name, value in stock.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    pipe = FluxImg2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    model, plain = adapt(pipe.transformer, TARGETS)
    errors, levels = compare_calls(model, plain, level=sigma_of), watch(model)
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    latents(pipe, image=image, num_inference_steps=5, strength=0.6)
    assert levels == [[pytest.approx(float(sigma), abs=1e-6)] for sigma in pipe.scheduler.sigmas[2:5]]
    assert levels[0][0] < 0.9
    assert max(errors) < ROUNDING


@pytest.mark.parametrize("per_token", [False, True], ids=["Wan 2.1", "Wan 2.2 TI2V"])
@pytest.mark.parametrize("kind", ["Euler", "UniPC"])
def test_wan(kind, per_token):
    """Wan 2.2 TI2V hands its transformer one timestep a token."""
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = small_wan(scheduler=unipc if kind == "UniPC" else None, expand_timesteps=per_token)
    model, plain = adapt(pipe.transformer, ATTENTION)
    errors, levels, shapes = compare_calls(model, plain), watch(model), []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["timestep"].dim()), with_kwargs=True)
    wan_latents(pipe)
    assert set(shapes) == {2 if per_token else 1}
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:4] for _ in range(2)]
    assert levels == [
        [pytest.approx(sigma, abs=1e-3 + 1e-6)] for sigma in sigmas
    ]  # UniPC cuts its timesteps to whole numbers
    assert max(errors) < ROUNDING
