"""Each family against its own pipeline of Diffusers: the denoiser's call, the latents, and a step of training."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.family import Family
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.pipelines import family_of
from nara_diffusion.dreambooth.training_step import PromptCache, posterior_of, scale_latents
from tests.helpers.adapted import disturb
from tests.helpers.denoisers import told
from tests.helpers.pipelines.families import FAMILY_PIPELINES, small_flux2_dev, small_wan_images
from tests.helpers.rounding import rounding_of

pytestmark = pytest.mark.filterwarnings("ignore:.*(guidance|max_sequence_length|cfg).*")

PROMPTS = ["a toy", "a red toy on grass"]
LENGTHS = {"stable-diffusion-3": 5, "flux": 12, "flux-2": 64, "flux2 dev": 700, "z-image": 96, "qwen-image": 300}
LENGTHS["wan"] = 20
UNGUIDED = {
    "flux": {"guidance_scale": 3.5},
    "flux2 dev": {"guidance_scale": 4.0},
    "qwen-image": {"true_cfg_scale": 1.0},
    "z-image": {"guidance_scale": 0.0},
}
PIPELINES = {
    **FAMILY_PIPELINES,
    "wan 2.2": lambda: small_wan_images(expand_timesteps=True),
    "flux2 dev": small_flux2_dev,
}
INDICES = torch.tensor([150, 800])


@dataclass
class Run:
    """A pipeline's run of three steps: the calls of its denoiser, what they returned, the latents after each step."""

    pipe: Any
    family: Family
    size: tuple[int, int]
    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    def grid(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) of what the pipeline keeps between steps, by the pipeline's own means."""
        height, width = self.size
        if self.family.name == "flux":
            return self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        if self.family.name == "qwen-image":
            return self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)[:, :, 0]
        if self.family.name == "flux-2":
            h, w = (side // self.pipe.vae_scale_factor // 2 for side in self.size)
            ids = self.pipe._prepare_latent_ids(torch.zeros(len(latents), 1, h, w))
            return Flux2Pipeline._unpack_latents_with_ids(latents, ids)
        return latents[:, :, 0] if self.family.name == "wan" else latents

    def kept(self, grid: Tensor) -> Tensor:
        """The inverse of `grid`."""
        b, c, h, w = grid.shape
        if self.family.name in ("flux", "qwen-image"):
            return self.pipe._pack_latents(grid, b, c, h, w)
        if self.family.name == "flux-2":
            return self.pipe._pack_latents(grid)
        return grid[:, :, None] if self.family.name == "wan" else grid


@contextmanager
def recorded(module: Any, calls: list[dict[str, Any]], outputs: list[Any] | None = None) -> Iterator[None]:
    """Arguments of each forward by name; those that are None, empty or about the form of the result are left out."""
    signature = inspect.signature(module.forward)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name != "return_dict" and value is not None}
        calls.append({name: value for name, value in given.items() if value != {}})

    def after(module: Any, args: Any, output: Any) -> None:
        if outputs is not None:
            outputs.append(output[0])

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def configured(name: str, pipe: Any) -> Family:
    family = family_of(pipe)
    return replace(family, max_sequence_length=LENGTHS.get(name, LENGTHS.get(family.name)))


def sampled(name: str, replace_last: Tensor | None = None) -> Run:
    """A run without guidance on images that are higher than wide."""
    pipe = PIPELINES[name]()
    family = configured(name, pipe)
    side = max(8, family.divisor(pipe))  # which Stable Diffusion's pipelines demand
    run = Run(pipe, family, (3 * side, 2 * side))

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if replace_last is not None and step == len(pipe.scheduler.timesteps) - 1:
            return {"latents": run.kept(replace_last)}
        run.latents.append(tensors["latents"])
        return {}

    call: dict[str, Any] = {"height": run.size[0], "width": run.size[1], "num_inference_steps": 3}
    call |= UNGUIDED.get(name, UNGUIDED.get(family.name, {"guidance_scale": 1.0}))
    call |= family.sample_call
    if family.name == "wan":
        call["num_frames"] = 1
    if replace_last is None:
        call["output_type"] = "latent"
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    with recorded(getattr(pipe, family.denoiser), run.calls, run.outputs):
        pipe(prompt=list(PROMPTS), generator=generators, callback_on_step_end=keep, **call)
    return run


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_denoiser_is_called_as_the_pipeline_calls_it(name: str) -> None:
    run = sampled(name)
    scheduler, denoiser = run.pipe.scheduler, getattr(run.pipe, run.family.denoiser)
    embeddings = run.family.encode(run.pipe, PROMPTS)
    assert not any(torch.equal(part[0], part[1]) for part in embeddings if part.is_floating_point())
    time_ids = torch.tensor([[*run.size, 0, 0, *run.size]]).expand(2, -1)
    for step in (1, 2):
        sample = run.grid(run.latents[step - 1]) if run.family.is_flow else run.calls[step]["sample"]
        timestep = scheduler.timesteps[step].expand(2)
        ours: list[dict[str, Any]] = []
        with recorded(denoiser, ours):
            prediction = run.family.predict(denoiser, sample, timestep, time_ids, embeddings)
        theirs = dict(run.calls[step])
        if not run.family.is_flow:
            theirs["timestep"] = theirs["timestep"].expand(2)
        torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5, check_dtype=False)  # that of a timestep
        if run.family.is_flow:  # what the pipeline's Euler step made of its denoiser's output
            moved = (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * prediction
            torch.testing.assert_close(sample + moved, run.grid(run.latents[step]), rtol=1e-5, atol=1e-5)
            assert moved.abs().mean() > 1e-3
        else:
            torch.testing.assert_close(prediction, run.outputs[step], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux2", "qwen_image", "wan"])
@torch.no_grad()
def test_latents_are_what_the_pipeline_decodes_to_the_same_z(name: str, monkeypatch) -> None:
    pipe = PIPELINES[name]()
    side = max(8, family_of(pipe).divisor(pipe))
    pixels = torch.rand(2, 3, 3 * side, 2 * side, generator=torch.Generator().manual_seed(4)) * 2 - 1
    mean, std = posterior_of(pipe.vae, pixels)
    z = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    decoded: list[Tensor] = []
    kind = type(pipe.vae)
    decode = kind.decode

    def record(self: Any, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(z)
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(kind, "decode", record)
    sampled(name, replace_last=scale_latents(pipe.vae, z))
    (found,) = decoded
    tolerance = 10 * rounding_of(pipe.vae)
    torch.testing.assert_close(found[:, :, 0] if found.dim() == 5 else found, z, rtol=tolerance, atol=tolerance)


def trained(name: str) -> AdaptedDenoiser:
    """With an adapter whose weights all differ from those of their start."""
    pipe = FAMILY_PIPELINES[name]()
    convention = build_objective(pipe.scheduler).source.convention
    core = {"core_hidden_dims": (4, 4), "core_init": "kaiming", "noise_convention": convention}
    config = NaraConfig(r=2, target_modules=["to_q", "to_v"], **core)  # type: ignore[arg-type]
    model = AdaptedDenoiser(pipe, config, family=configured(name, pipe))
    disturb(model, scale=0.2)
    return model.eval()


def inputs(model: AdaptedDenoiser) -> tuple[dict[str, Any], Tensor]:
    """A batch of two, at unequal noise levels and with prompts of unequal lengths; and the target."""
    pipe, generator = model.pipe, torch.Generator().manual_seed(4)
    channels = pipe.vae.config.get("latent_channels") or pipe.vae.config.z_dim
    latents = scale_latents(pipe.vae, torch.randn(2, channels, 8, 4, generator=generator))
    objective = build_objective(pipe.scheduler)
    corrupted = objective.corrupt(latents, torch.randn(latents.shape, generator=generator), INDICES)
    embeddings = PromptCache(pipe, model.family).get(PROMPTS)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
    call = {"sample": corrupted.model_input, "timestep": corrupted.timestep, "time_ids": ids, "embeddings": embeddings}
    return call, corrupted.target


@pytest.mark.parametrize("name", FAMILY_PIPELINES)
def test_family_trains_at_the_objectives_noise_levels(name: str) -> None:
    """A batch is its samples one by one."""
    model = trained(name)
    call, target = inputs(model)
    outputs: list[Tensor] = []
    with torch.no_grad():
        levels = told(model.denoiser, lambda: outputs.append(model(**call)))
        for i in range(2):  # each with padding that nothing reads
            alone = {key: value[i : i + 1] for key, value in call.items() if key != "embeddings"}
            single = model(**alone, embeddings=PromptCache(model.pipe, model.family).get(PROMPTS[i : i + 1]))
            torch.testing.assert_close(single, outputs[0][i : i + 1], rtol=2e-4, atol=2e-4)
    assert levels == pytest.approx(build_objective(model.pipe.scheduler).noise_levels[INDICES].tolist(), abs=1e-6)
    assert outputs[0].shape == target.shape
    (model(**call) - target).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.trained.values())


def test_time_ids_are_whole_numbers_in_bf16_too(monkeypatch) -> None:
    pipe, seen = FAMILY_PIPELINES["sdxl"](), []
    embed = pipe.unet.add_time_proj.forward
    monkeypatch.setattr(pipe.unet.add_time_proj, "forward", lambda ids: seen.append(ids.tolist()) or embed(ids))
    pipe.unet.to(torch.bfloat16)
    ids = [1021.0, 1533.0, 301.0, 0.0, 1024.0, 1024.0]
    embeddings = (torch.randn(1, 12, 40), torch.randn(1, 24))
    family_of(pipe).predict(pipe.unet, torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([ids]), embeddings)
    assert seen == [ids]
