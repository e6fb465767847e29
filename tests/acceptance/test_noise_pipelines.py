"""Diffusers' pipelines tell an adapted denoiser λ at each step, by whatever scheduler they have at that time.

The reference is a stock denoiser that is given the same at each step; its weights are W0 + s·B·C(λ)·A, written anew at
the λ that the scheduler's own σ or timestep gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from torch import Tensor

from nara_diffusion import TimestepNoise, noise_level, set_noise_source
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_flux, small_sd3, small_sdxl

from ._noise_models import UNET_TARGETS, Stock, adapt, assert_near, distance, run, tensor_of

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLUX_TARGETS = ["to_q", "to_out.0", "add_k_proj", "proj_mlp", "norm1.linear"]
SD3_TARGETS = ["to_v", "add_q_proj", "net.2"]
LevelOf = Callable[[Any, int], float]
"""(scheduler, step) → λ."""


def share_of(scheduler: Any, step: int) -> float:
    return float(scheduler.timesteps[step]) / scheduler.config.num_train_timesteps


def sigma_of(scheduler: Any, step: int) -> float:
    return float(scheduler.sigmas[step])


def edm_level_of(scheduler: Any, step: int) -> float:
    sigma = float(scheduler.sigmas[step])
    return sigma / (1 + sigma)


def latents(pipe: Any, prompt: Any = ("a photo of a toy", "red"), **options: Any) -> Tensor:
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "latent"}
    return pipe(list(prompt), generator=torch.Generator().manual_seed(0), **{**call, **options}).images


@contextmanager
def compared_calls(pipe: Any, stock: Stock, level: LevelOf) -> Iterator[list[float]]:
    """How far each forward of the denoiser inside is from the stock one, given the same, at the λ of the step.

    So no sampler multiplies the rounding of a step.
    """
    errors: list[float] = []

    def compare(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        expected = run(stock.at(level(pipe.scheduler, len(errors))), *args, **kwargs)
        errors.append(distance(tensor_of(output), expected))

    handle = stock.adapted.register_forward_hook(compare, with_kwargs=True)
    yield errors
    handle.remove()


def assert_all_right(errors: list[float], denoiser: Any, steps: int = 3, roundings: float = 2) -> None:
    assert len(errors) == steps
    assert max(errors) < roundings * rounding_of(denoiser), errors


@pytest.mark.parametrize(
    ("make", "targets", "level", "options"),
    [
        (small_sdxl, UNET_TARGETS, share_of, {"num_images_per_prompt": 2}),
        (small_sd3, SD3_TARGETS, sigma_of, {}),
        (small_flux, FLUX_TARGETS, sigma_of, {"max_sequence_length": 12}),
    ],
    ids=["SDXL", "SD3", "Flux"],
)
def test_pipeline_tells_the_level_of_each_step(
    make: Callable[[], Any], targets: list[str], level: LevelOf, options: dict[str, Any]
) -> None:
    pipe = make()
    denoiser, stock = adapt(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, targets)
    with compared_calls(pipe, stock, level) as errors:
        latents(pipe, **options)
    assert_all_right(errors, denoiser)
    with compared_calls(pipe, stock, lambda *step: abs(level(*step) - 0.01)) as wrong:
        latents(pipe, **options)
    assert min(wrong) > 4 * rounding_of(denoiser)  # a λ that is off by a hundredth is seen at every step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of SDXL's UNet, as a pipeline saves it."""
    pipe = small_sdxl()
    adapt(pipe.unet, UNET_TARGETS)
    pipe.save_nara_weights(made := tmp_path_factory.mktemp("adapter"))
    return made


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Stock]:
    """A pipeline into which it was loaded."""
    pipe, plain = small_sdxl(), small_sdxl().unet
    pipe.load_nara_weights(folder, adapter_name="default")
    return pipe, Stock(plain, pipe.unet)


def test_pipeline_scheduler_swapped_tells_its_own_length(loaded: tuple[Any, Stock]) -> None:
    pipe, stock = loaded
    first, shorter = pipe.scheduler, DDIMScheduler(**BETAS, num_train_timesteps=400)
    with compared_calls(pipe, stock, lambda scheduler, call: share_of(scheduler, call % 3)) as errors:
        for pipe.scheduler in (first, shorter, first):
            latents(pipe)
    assert_all_right(errors, pipe.unet, 9, roundings=10)  # at timestep 0 the stock UNet alone is off by 3 or 4


def test_pipeline_loaded_with_another_length_tells_it_to_the_denoiser_alone(folder: Path) -> None:
    held, plain = [small_sdxl()], small_sdxl().unet
    held[0].scheduler = DDIMScheduler(**BETAS, num_train_timesteps=400)
    held[0].load_nara_weights(folder, adapter_name="default")
    unet = held[0].unet
    stock = Stock(plain, unet).double()
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 40)
    added = {"text_embeds": torch.randn(1, 24), "time_ids": torch.ones(1, 6)}
    doubled = {name: tensor.double() for name, tensor in added.items()}
    expected = run(stock.at(0.25), latents.double(), 100, text.double(), added_cond_kwargs=doubled)
    assert_near(run(unet, latents, 100, text, added_cond_kwargs=added), expected, unet)


def test_pipeline_of_edm_tells_its_level_once_that_is_declared() -> None:
    pipe = small_sdxl()
    pipe.scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    unet, stock = adapt(pipe.unet, UNET_TARGETS)
    set_noise_source(unet, TimestepNoise("edm"))
    with compared_calls(pipe, stock, edm_level_of) as errors:
        latents(pipe)
    assert_all_right(errors, unet)


def test_context_around_a_pipeline_beats_its_timesteps(loaded: tuple[Any, Stock]) -> None:
    pipe, stock = loaded
    with compared_calls(pipe, stock, lambda *_: 0.3) as errors, noise_level(pipe.unet, 0.3):
        latents(pipe)
    assert_all_right(errors, pipe.unet)
