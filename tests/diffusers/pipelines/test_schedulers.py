"""λ through whole pipelines is the noise of their own scheduler: at each step, for each layer.

Told by the core itself and compared with what the scheduler gives; and each call of the denoiser equals one with the
weights W0 + s·B·C(λ)·A of that λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from nara_diffusion import TimestepNoise, noise_level, set_noise_source
from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, latents, watch
from tests.helpers.adapted import relative_error
from tests.helpers.small_pipelines import TEXT_WIDTHS, small_sd, small_sdxl, small_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Diffusers' Karras sigmas
]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def swapped(pipe: Any, kind: Any, **options: Any) -> Any:
    """`pipe` as another pipeline of the same components."""
    other = kind(**{**pipe.components, **options})
    other.set_progress_bar_config(disable=True)
    return other


def run(pipe: Any, expected: list[float], targets: list[str] | None = None, **call: Any) -> None:
    """A run of `pipe`, adapted, asks for the levels `expected`, and each call equals one with merged weights."""
    unet, plain = adapt(pipe.unet, targets)
    errors, levels = compare_calls(unet, plain), watch(unet)
    latents(pipe, **call)
    assert [len(level) for level in levels] == [1] * len(expected)
    assert [level[0] for level in levels] == pytest.approx(expected, abs=1e-6)
    assert max(errors) < ROUNDING


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    "DDPM": lambda: DDPMScheduler(**BETAS, clip_sample=False),
    "Euler": lambda: EulerDiscreteScheduler(**BETAS),
    "Euler, trailing": lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "Euler, Karras sigmas": lambda: EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    "Euler, exponential sigmas": lambda: EulerDiscreteScheduler(**BETAS, use_exponential_sigmas=True),
    "Euler ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS),
    "Heun": lambda: HeunDiscreteScheduler(**BETAS),
    "DPM-Solver++, Karras sigmas": lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "UniPC": lambda: UniPCMultistepScheduler(**BETAS),
    "TCD": lambda: TCDScheduler(**BETAS),
    "LCM": lambda: LCMScheduler(**BETAS),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_level_is_the_share_of_the_schedule_that_a_timestep_is(name):
    pipe = small_sdxl()
    pipe.scheduler = SCHEDULERS[name]()
    pipe.scheduler.set_timesteps(4)
    timesteps = [float(t) for t in pipe.scheduler.timesteps]
    if name == "Euler, Karras sigmas":
        assert any(t != round(t) for t in timesteps)
    run(pipe, [t / 1000 for t in timesteps], ATTENTION, num_inference_steps=4)


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo(steps):
    """Distilled for few steps, of which the first is at t = 999, without guidance."""
    pipe = small_sdxl()
    pipe.scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    expected = {1: [0.999], 4: [0.999, 0.749, 0.499, 0.249]}[steps]
    run(pipe, expected, num_inference_steps=steps, guidance_scale=0.0)


def test_lcm_with_guidance_as_an_input():
    """LCM's UNet is conditioned on the guidance scale, and runs without CFG."""
    pipe = small_sdxl(time_cond_proj_dim=8)
    pipe.scheduler = LCMScheduler(**BETAS)
    run(pipe, [0.999, 0.759, 0.499, 0.259], num_inference_steps=4, guidance_scale=8.0)


def test_the_comparison_notices_a_level_that_is_off_by_a_hundredth():
    pipe = small_sdxl()
    unet, plain = adapt(pipe.unet)
    errors = compare_calls(unet, plain, level=lambda t: max(0.0, float(t) / 1000 - 0.01))
    latents(pipe, num_inference_steps=4)
    assert max(errors) > 10 * ROUNDING


def test_timesteps_of_one_s_own():
    run(small_sdxl(), [0.999, 0.5, 0.003], timesteps=[999, 500, 3])


# ---------------------------------------------------------------------- EDM: t = ¼ ln σ


EDM: dict[str, Callable[[], Any]] = {
    "EDMEuler": lambda: EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0),
    "EDMEuler, much noise": lambda: EDMEulerScheduler(sigma_min=1.1, sigma_max=80.0),  # timesteps ≥ 0 alone
    "EDMDPM": lambda: EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0),
    "continuous": lambda: EulerDiscreteScheduler(
        **BETAS, timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    ),
}


@pytest.mark.parametrize("name", EDM)
def test_edm(name):
    """λ = σ / (1 + σ), once it is said that this pipeline means that; refused before."""
    pipe = small_sdxl()
    pipe.scheduler = EDM[name]()
    unet, plain = adapt(pipe.unet)
    seen = watch(unet)
    with pytest.raises(
        ValueError, match=r'(EDM\w+|Euler\w+) passes ¼ ln σ: .* set_noise_source\(model, TimestepNoise\("edm"\)\)'
    ):
        latents(pipe, num_inference_steps=5)
    assert not seen  # no layer has seen a C of a wrong λ
    set_noise_source(unet, TimestepNoise("edm"))
    errors = compare_calls(unet, plain, level=lambda t: math.exp(4 * t) / (1 + math.exp(4 * t)))
    levels = watch(unet)
    latents(pipe, num_inference_steps=5)
    pipe.scheduler.set_timesteps(5)
    expected = [float(sigma / (1 + sigma)) for sigma in pipe.scheduler.sigmas[:5].double()]
    assert [level for (level,) in levels] == pytest.approx(expected, abs=1e-5)
    assert levels[0][0] > 0.9
    assert max(errors) < ROUNDING


# ---------------------------------------------------------------------- pipelines that start or end midway


IMAGE = Image.effect_noise((16, 16), 60).convert("RGB")
MASK = Image.fromarray((torch.arange(256).view(16, 16) % 16 < 8).numpy().astype("uint8") * 255)


@pytest.mark.parametrize("make", [small_sd, small_sdxl])
def test_image_to_image_starts_midway(make):
    kind = StableDiffusionImg2ImgPipeline if make is small_sd else StableDiffusionXLImg2ImgPipeline
    stock = make()
    optional = {"requires_safety_checker": False} if make is small_sd else {}
    pipe = swapped(stock, kind, scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1), **optional)
    pipe.scheduler.set_timesteps(5)
    expected = [float(t) / 1000 for t in pipe.scheduler.timesteps[2:]]
    assert expected[0] < 0.7
    unet, plain = adapt(pipe.unet)
    errors, levels = compare_calls(unet, plain), watch(unet)
    call = {"num_inference_steps": 5, "strength": 0.6, "output_type": "latent"}
    pipe(["a toy", "red"], image=[IMAGE, IMAGE], generator=torch.Generator().manual_seed(0), **call)
    assert [level for (level,) in levels] == pytest.approx(expected, abs=1e-6)
    assert max(errors) < ROUNDING


@pytest.mark.parametrize(
    ("make", "kind", "channels"),
    [
        (small_sd, StableDiffusionInpaintPipeline, 9),
        (small_sdxl, StableDiffusionXLInpaintPipeline, 4),
        (small_sdxl, StableDiffusionXLInpaintPipeline, 9),
    ],
)
def test_inpainting(make, kind, channels):
    optional = {"requires_safety_checker": False} if make is small_sd else {}
    pipe = swapped(
        make(in_channels=channels), kind, scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1), **optional
    )
    unet, plain = adapt(pipe.unet)
    errors, levels = compare_calls(unet, plain), watch(unet)
    call = {"num_inference_steps": 4, "strength": 0.8, "height": 16, "width": 16, "output_type": "latent"}
    pipe("a toy", image=IMAGE, mask_image=MASK, generator=torch.Generator().manual_seed(0), **call)
    pipe.scheduler.set_timesteps(4)
    assert [level for (level,) in levels] == pytest.approx([float(t) / 1000 for t in pipe.scheduler.timesteps[1:]])
    assert max(errors) < ROUNDING


def test_instructions_with_three_parts_of_guidance():
    stock = small_sd(in_channels=8)
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1)
    pipe = swapped(stock, StableDiffusionInstructPix2PixPipeline, scheduler=scheduler, requires_safety_checker=False)
    unet, plain = adapt(pipe.unet)
    errors, rows = compare_calls(unet, plain), []
    unet.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pipe("red", image=image, num_inference_steps=3, output_type="latent")
    assert rows == [3, 3, 3]
    assert max(errors) < ROUNDING


def test_base_and_refiner_share_one_schedule():
    """The base stops where the refiner, conditioned on an aesthetic score, goes on: λ falls through both."""
    base = small_sdxl()
    base_unet, base_plain = adapt(base.unet)
    errors, first = compare_calls(base_unet, base_plain), watch(base_unet)
    noisy = latents(base, num_inference_steps=8, denoising_end=0.6)
    _, second_width = TEXT_WIDTHS
    conditioning = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 5 * 4 + second_width,
    }
    own = {"unet": small_unet(second_width, **conditioning), "text_encoder": None, "tokenizer": None}
    refiner = swapped(small_sdxl(), StableDiffusionXLImg2ImgPipeline, **own, requires_aesthetics_score=True)
    unet, plain = adapt(refiner.unet)
    errors, second = errors + compare_calls(unet, plain), watch(unet)
    call = {"num_inference_steps": 8, "denoising_start": 0.6, "output_type": "latent"}
    refiner("a toy", image=noisy, generator=torch.Generator().manual_seed(0), **call)
    base.scheduler.set_timesteps(8)
    expected = [float(t) / 1000 for t in base.scheduler.timesteps]
    assert [level for (level,) in [*first, *second]] == pytest.approx(expected, abs=1e-6)
    assert first
    assert second
    assert max(errors) < ROUNDING


# ---------------------------------------------------------------------- the batch of a pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("make", [small_sd, small_sdxl])
def test_prompts_images_a_prompt_and_guidance(make, guidance_scale):
    pipe = make()
    unet, plain = adapt(pipe.unet)
    errors, levels, rows = compare_calls(unet, plain), watch(unet), []
    unet.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    latents(pipe, ["a toy", "red"], num_images_per_prompt=3, guidance_scale=guidance_scale)
    assert set(rows) == {6 if guidance_scale == 1 else 12}
    assert max(errors) < ROUNDING
    assert len(errors) == len(levels)


def test_guidance_that_a_callback_turns_off_midway():
    pipe = small_sdxl()
    unet, plain = adapt(pipe.unet)
    errors, levels, rows = compare_calls(unet, plain), watch(unet), []
    unet.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    inputs = ["prompt_embeds", "add_text_embeds", "add_time_ids"]

    def turn_off(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            return {name: kwargs[name].chunk(2)[-1] for name in inputs}
        return {}

    call = {"callback_on_step_end": turn_off, "callback_on_step_end_tensor_inputs": inputs}
    latents(pipe, num_inference_steps=4, **call)
    assert rows == [2, 2, 1, 1]
    pipe.scheduler.set_timesteps(4)
    assert [level for (level,) in levels] == pytest.approx([float(t) / 1000 for t in pipe.scheduler.timesteps])
    assert max(errors) < ROUNDING


def test_a_level_that_is_set_around_a_pipeline_holds_at_every_step():
    pipe = small_sd()
    unet, plain = adapt(pipe.unet)
    errors, levels = compare_calls(unet, plain, level=lambda _: 0.3), watch(unet)
    with noise_level(unet, 0.3):
        fixed = latents(pipe)
    assert levels == [[pytest.approx(0.3)]] * 4
    assert max(errors) < ROUNDING
    unet._forward_hooks.popitem()  # the comparison, which would find another λ
    assert relative_error(latents(pipe), fixed) > 1e-2
