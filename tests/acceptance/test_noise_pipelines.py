"""Diffusers' pipelines tell an adapted denoiser λ at each step, by whatever scheduler they have at that time.

The reference is a stock denoiser that is given the same at each step; its weights are W0 + s·B·C(λ)·A, written anew at
the λ that the scheduler's own σ or timestep gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, EDMEulerScheduler, StableDiffusionXLPAGPipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import TimestepNoise, register_denoiser, set_noise_source
from nara_diffusion.noise.timesteps import DenoiserNoise
from nara_diffusion.tuner.holder import holder_of
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_flux, small_sd, small_sd3, small_sdxl

from ._noise_models import UNET_TARGETS, Stock, adapt, distance, run, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:.*PAG.*deprecated:FutureWarning")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS: dict[str, Callable[[Any, int, float], float]] = {
    "t / N": lambda scheduler, step, timestep: timestep / scheduler.config.num_train_timesteps,
    "σ": lambda scheduler, step, timestep: float(scheduler.sigmas[step]),
    "σ / (1 + σ)": lambda scheduler, step, timestep: float(scheduler.sigmas[step] / (1 + scheduler.sigmas[step])),
}
"""(scheduler, step, timestep as the denoiser gets it) → λ."""


def errors_of(pipe: Any, stock: Stock, level: str, wrong: list[float] | None = None, **options: Any) -> list[float]:
    """The error of each forward of the denoiser, compared with the stock one at the step's λ.

    Those at a λ that is off by a hundredth go into `wrong`.
    The sample is noise, the same at each step: on a sampled trajectory a small UNet can multiply rounding by 10⁴.
    """
    errors: list[float] = []

    def replace_sample(_: Any, args: Any, kwargs: Any) -> Any:
        name = "sample" if "sample" in kwargs else "hidden_states"
        sample = args[0] if args else kwargs[name]
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1)).to(sample)
        return ((noise, *args[1:]), kwargs) if args else (args, {**kwargs, name: noise})

    def compare(denoiser: Any, args: Any, kwargs: Any, output: Any) -> None:
        if hasattr(denoiser, "attn_processors"):  # pipelines set some when they are called
            stock.model.set_attn_processor(dict(denoiser.attn_processors))
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        level_of_step = LEVELS[level](pipe.scheduler, len(errors), float(timestep.flatten()[0]))
        errors.append(distance(tensor_of(output), run(stock.at(level_of_step), *args, **kwargs)))
        if wrong is not None:
            other = run(stock.at(abs(level_of_step - 0.01)), *args, **kwargs)
            wrong.append(distance(tensor_of(output), other))

    handles = [
        stock.adapted.register_forward_pre_hook(replace_sample, with_kwargs=True),
        stock.adapted.register_forward_hook(compare, with_kwargs=True),
    ]
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", "height": 16, "width": 16}
    pipe(["a photo of a toy", "red"], generator=torch.Generator().manual_seed(0), **call, **options)
    for handle in handles:
        handle.remove()
    assert len(errors) == 3
    return errors


def with_perturbed_attention() -> Any:
    parts = {name: part for name, part in small_sdxl().components.items() if part is not None}
    pipe = StableDiffusionXLPAGPipeline(**parts, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, tuple[Callable[[], Any], list[str], str, dict[str, Any]]] = {
    "SDXL, two images a prompt": (small_sdxl, UNET_TARGETS, "t / N", {"num_images_per_prompt": 2}),
    "SDXL, perturbed attention": (with_perturbed_attention, UNET_TARGETS, "t / N", {"pag_scale": 2.0}),
    "SD3": (small_sd3, ["to_v", "add_q_proj", "net.2"], "σ", {}),
    "Flux": (
        small_flux,
        ["to_q", "to_out.0", "add_k_proj", "proj_mlp", "norm1.linear"],
        "σ",
        {"max_sequence_length": 12},
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_gives_each_step_its_level(name: str) -> None:
    make, targets, level, options = PIPELINES[name]
    pipe = make()
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser, stock = adapt(denoiser.to(memory_format=torch.channels_last), targets)
    wrong: list[float] = []
    assert max(errors_of(pipe, stock, level, wrong, **options)) < 4 * rounding_of(denoiser)
    assert min(wrong) > 4 * rounding_of(denoiser)  # a λ that is off by a hundredth is seen at every step


@pytest.mark.usefixtures("_registry")
def test_registered_controlnet_reads_its_timestep() -> None:
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([20, 500, 900]), torch.randn(3, 5, 16), torch.rand(3, 3, 16, 16)
    plain = ControlNetModel.from_unet(small_sd().unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)  # so that its zero convolutions have a say
    model, _ = adapt(copy.deepcopy(plain), ["to_q", "to_v"])
    with pytest.raises(ValueError, match=r"register_denoiser\('ControlNetModel', meaning\) before adding adapters"):
        model(*inputs)
    register_denoiser("ControlNetModel")
    model, stock = adapt(plain, ["to_q", "to_v"])
    actual = model(*inputs)[1]
    for i, level in enumerate((0.02, 0.5, 0.9)):
        with torch.no_grad():
            expected = stock.at(level)(*(tensor[i : i + 1] for tensor in inputs))[1]
        assert distance(actual[i : i + 1], expected) < rounding_of(model)


# ---------------------------------------------------------------------- the scheduler


def test_swapped_scheduler_counts_by_its_own_length(tmp_path: Path) -> None:
    trained, pipe, plain = small_sdxl(), small_sdxl(), small_sdxl().unet
    adapt(trained.unet, UNET_TARGETS)
    trained.save_nara_weights(tmp_path)
    pipe.load_nara_weights(tmp_path, adapter_name="default")
    first, shorter = pipe.scheduler, DDIMScheduler(**BETAS, num_train_timesteps=400)
    stock = Stock(plain, pipe.unet)
    for pipe.scheduler in (first, shorter, first):
        errors = errors_of(pipe, stock, "t / N")
        assert max(errors) < 10 * rounding_of(pipe.unet)  # at timestep 0 the stock UNet alone is off by 3 or 4


def test_edm_pipeline_needs_declared_levels(tmp_path: Path) -> None:
    pipe, again, plain = small_sdxl(), small_sdxl(), small_sdxl().unet
    unet, stock = adapt(pipe.unet, UNET_TARGETS, noise_convention="edm")
    pipe.save_nara_weights(tmp_path)
    again.load_nara_weights(tmp_path, adapter_name="default")
    with pytest.raises(ValueError, match=r"timestep is 999.* gives a λ outside .*'edm'"):
        again("red")
    with pytest.raises(ValueError, match="trained with λ defined as 'edm', but the source of λ gives 'timestep'"):
        set_noise_source(again.unet, TimestepNoise())
    set_noise_source(unet, TimestepNoise("edm"))
    for pipeline, reference in ((pipe, stock), (again, Stock(plain, again.unet))):
        pipeline.scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
        assert max(errors_of(pipeline, reference, "σ / (1 + σ)")) < 4 * rounding_of(pipeline.unet)


# ---------------------------------------------------------------------- timesteps that a pipeline rounds


def levels_of(pipe: Any, **options: Any) -> list[Tensor]:
    """λ of each step, as the core gets it."""
    levels: list[Tensor] = []
    (core,) = holder_of(pipe.transformer).cores["default"].children()  # type: ignore[union-attr]
    handle = core.register_forward_pre_hook(lambda _, args: levels.append(args[0].detach().clone()))
    call = {"output_type": "latent", "height": 16, "width": 16, "max_sequence_length": 12}
    pipe(["a photo of a toy", "red"], **call, **options)
    handle.remove()
    return levels


def test_flux_in_bfloat16_has_its_schedules_levels(tmp_path: Path) -> None:
    trained, pipe = small_flux(), small_flux().to(torch.bfloat16)
    adapt(trained.transformer, ["to_q"])
    trained.save_nara_weights(tmp_path)
    pipe.load_nara_weights(tmp_path, adapter_name="default")
    levels = levels_of(pipe, num_inference_steps=7)
    sigmas = pipe.scheduler.sigmas[:7]
    rounded = (pipe.scheduler.timesteps.bfloat16() / 1000).float()
    assert distance(rounded, sigmas) > 1e-3
    assert distance(torch.stack(levels), sigmas[:, None].expand(-1, 2)) < 1e-6  # two: a cast has no strides of 0
    set_noise_source(pipe.transformer, TimestepNoise("sigma"))  # knows no scheduler
    assert distance(torch.stack(levels_of(pipe, num_inference_steps=7)), rounded[:, None].expand(-1, 2)) < 1e-6


def test_ambiguous_rounded_timestep_stays() -> None:
    def scheduler(*timesteps: float) -> Any:
        return SimpleNamespace(config={"num_train_timesteps": 1000}, timesteps=torch.tensor(timesteps))

    for meaning, rounded, meant, schedule in [
        ("sigma", torch.tensor([868.0]).bfloat16() / 1000, 0.8667, (866.7, 250.0, 0.0)),
        ("sigma", torch.tensor([0.8667]).bfloat16(), 0.8667, (866.7, 250.0, 0.0)),
        ("sigma_1000", torch.tensor([866.7]).half(), 0.8667, (866.7, 250.0, 0.0)),
        ("data", (1000 - torch.tensor([866.7]).bfloat16()) / 1000, 0.8667, (866.7, 250.0, 0.0)),
        ("data_1000", torch.tensor([866.7]).bfloat16(), 0.1333, (866.7, 250.0, 0.0)),
        ("sigma_1000", torch.tensor([866.7]).bfloat16(), 0.868, (866.7, 868.5, 0.0)),
        ("sigma_1000", torch.tensor([866.7]).bfloat16(), 0.8667, (866.7, 866.7)),  # twice, as Heun's
        ("sigma_1000", torch.tensor([700.0]).bfloat16(), 0.7, (866.7, 250.0, 0.0)),
        ("sigma_1000", torch.tensor([868.0]), 0.868, (866.7, 250.0)),  # not rounded
    ]:
        source = DenoiserNoise(meaning, schedulers=[scheduler(*schedule[:1]), scheduler(*schedule[1:])])
        assert source.noise_level(rounded).item() == pytest.approx(meant, abs=1e-6), (meaning, schedule)


def test_rounded_timestep_is_found_without_host_reads() -> None:
    class WithoutReads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    schedule = torch.tensor([866.7, 250.0, 0.0])
    with WithoutReads():
        actual = TimestepNoise("sigma_1000").unrounded(schedule.bfloat16(), schedule)
    assert torch.equal(actual, schedule)
