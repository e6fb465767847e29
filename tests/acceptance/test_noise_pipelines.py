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
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EDMEulerScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPAGPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from nara_diffusion import TimestepNoise, register_denoiser, set_noise_source
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_flux, small_sd, small_sd3, small_sdxl

from ._noise_models import UNET_TARGETS, Stock, adapt, distance, run, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:.*PAG.*deprecated:FutureWarning")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
LevelOf = Callable[[Any, int, float], float]
"""(scheduler, step, timestep as the denoiser gets it) → λ."""


def share_of(scheduler: Any, step: int, timestep: float) -> float:
    return timestep / scheduler.config.num_train_timesteps


def sigma_of(scheduler: Any, step: int, timestep: float) -> float:
    return float(scheduler.sigmas[step])


def edm_level_of(scheduler: Any, step: int, timestep: float) -> float:
    return float(scheduler.sigmas[step] / (1 + scheduler.sigmas[step]))


def latents(pipe: Any, prompt: Any = ("a photo of a toy", "red"), **options: Any) -> Tensor:
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    call |= {} if "image" in options else {"height": 16, "width": 16}
    return pipe(list(prompt), generator=torch.Generator().manual_seed(0), **{**call, **options}).images


@contextmanager
def compared_calls(pipe: Any, stock: Stock, level: LevelOf) -> Iterator[list[float]]:
    """How far each forward of the denoiser inside is from the stock one, given the same, at the λ of the step.

    So no sampler multiplies the rounding of a step.
    """
    errors: list[float] = []

    def compare(denoiser: Any, args: Any, kwargs: Any, output: Any) -> None:
        if hasattr(denoiser, "attn_processors"):  # pipelines set some when they are called
            stock.model.set_attn_processor(dict(denoiser.attn_processors))
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        expected = run(stock.at(level(pipe.scheduler, len(errors), float(timestep.flatten()[0]))), *args, **kwargs)
        errors.append(distance(tensor_of(output), expected))

    handle = stock.adapted.register_forward_hook(compare, with_kwargs=True)
    yield errors
    handle.remove()


def assert_all_right(errors: list[float], denoiser: Any, steps: int = 3, roundings: float = 4) -> None:
    assert len(errors) == steps
    assert max(errors) < roundings * rounding_of(denoiser), errors


def controlnet(unet: Any) -> ControlNetModel:
    """With the sizes of `unet`; its zero convolutions are random, so that it has a say."""
    torch.manual_seed(2)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def of_kind(kind: Any, **more: Any) -> Any:
    pipe = kind(**{name: part for name, part in small_sdxl().components.items() if part is not None}, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_control() -> Any:
    return of_kind(StableDiffusionXLControlNetPipeline, controlnet=controlnet(small_sdxl().unet))


def changed(change: Callable[[Any], Any]) -> Callable[[], Any]:
    """Makes a pipeline whose UNet computes otherwise."""

    def make() -> Any:
        pipe = small_sdxl()
        change(pipe.unet)
        return pipe

    return make


def with_perturbed_attention() -> Any:
    return of_kind(StableDiffusionXLPAGPipeline, pag_applied_layers=["mid"])


SDXL: tuple[Any, ...] = (UNET_TARGETS, share_of)
PIPELINES: dict[str, tuple[Callable[[], Any], list[str], LevelOf, dict[str, Any]]] = {
    "SDXL, two images a prompt": (small_sdxl, *SDXL, {"num_images_per_prompt": 2}),
    "SDXL, perturbed attention": (with_perturbed_attention, *SDXL, {"pag_scale": 2.0}),
    "SDXL, a ControlNet": (with_control, *SDXL, {"image": IMAGE, "guess_mode": True}),
    "SDXL, sliced attention": (changed(lambda unet: unet.set_attention_slice("auto")), *SDXL, {}),
    "SDXL, heads in the batch": (changed(lambda unet: unet.set_attn_processor(AttnProcessor())), *SDXL, {}),
    "SDXL, channels last": (changed(lambda unet: unet.to(memory_format=torch.channels_last)), *SDXL, {}),
    "SD3": (small_sd3, ["to_v", "add_q_proj", "net.2"], sigma_of, {}),
    "Flux": (
        small_flux,
        ["to_q", "to_out.0", "add_k_proj", "proj_mlp", "norm1.linear"],
        sigma_of,
        {"max_sequence_length": 12},
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_tells_the_level_of_each_step(name: str) -> None:
    make, targets, level, options = PIPELINES[name]
    pipe = make()
    denoiser, stock = adapt(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, targets)
    with compared_calls(pipe, stock, level) as errors:
        latents(pipe, **options)
    assert_all_right(errors, denoiser)
    with compared_calls(pipe, stock, lambda *step: abs(level(*step) - 0.01)) as wrong:
        latents(pipe, **options)
    assert min(wrong) > 4 * rounding_of(denoiser)  # a λ that is off by a hundredth is seen at every step


@pytest.mark.usefixtures("_registry")
def test_controlnet_with_an_adapter_of_its_own_reads_its_timestep_once_it_is_registered() -> None:
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([20, 500, 900]), torch.randn(3, 5, 16), IMAGE.expand(3, -1, -1, -1)
    model, _ = adapt(controlnet(small_sd().unet), ["to_q", "to_v"])
    with pytest.raises(ValueError, match=r"register_denoiser\('ControlNetModel', meaning\) before adding adapters"):
        model(*inputs)
    register_denoiser("ControlNetModel")
    model, stock = adapt(controlnet(small_sd().unet), ["to_q", "to_v"])
    found = model(*inputs)[1]
    for i, level in enumerate((0.02, 0.5, 0.9)):
        with torch.no_grad():
            expected = stock.at(level)(*(each[i : i + 1] for each in inputs))[1]
        assert distance(found[i : i + 1], expected) < rounding_of(model)


# ---------------------------------------------------------------------- the scheduler


def test_pipeline_scheduler_swapped_tells_its_own_length(tmp_path: Path) -> None:
    trained, pipe, plain = small_sdxl(), small_sdxl(), small_sdxl().unet
    adapt(trained.unet, UNET_TARGETS)
    trained.save_nara_weights(tmp_path)
    pipe.load_nara_weights(tmp_path, adapter_name="default")
    first, shorter = pipe.scheduler, DDIMScheduler(**BETAS, num_train_timesteps=400)
    with compared_calls(pipe, Stock(plain, pipe.unet), share_of) as errors:
        for pipe.scheduler in (first, shorter, first):
            latents(pipe)
    assert_all_right(errors, pipe.unet, 9, roundings=10)  # at timestep 0 the stock UNet alone is off by 3 or 4


def test_pipeline_of_edm_tells_its_level_once_that_is_declared_or_the_adapter_says_so(tmp_path: Path) -> None:
    pipe, again, plain = small_sdxl(), small_sdxl(), small_sdxl().unet
    unet, stock = adapt(pipe.unet, UNET_TARGETS, noise_convention="edm")
    pipe.save_nara_weights(tmp_path)
    again.load_nara_weights(tmp_path, adapter_name="default")
    with pytest.raises(ValueError, match=r"timestep is 999.* as 'edm' is no λ"):
        latents(again)
    with pytest.raises(ValueError, match="trained with λ defined as 'edm', but the source of λ tells 'timestep'"):
        set_noise_source(again.unet, TimestepNoise())
    set_noise_source(unet, TimestepNoise("edm"))
    for each, reference in ((pipe, stock), (again, Stock(plain, again.unet))):
        each.scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
        with compared_calls(each, reference, edm_level_of) as errors:
            latents(each)
        assert_all_right(errors, each.unet)
