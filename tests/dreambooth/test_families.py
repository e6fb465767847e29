"""Each family against its own pipeline of Diffusers: the denoiser's call, the latents, and a step of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.caches import PromptCache, scale_latents
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.families import Family, placed
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.pipelines import family_of
from tests.helpers.adapted import disturb
from tests.helpers.denoisers import levels_of_core, recorded
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


class Run(NamedTuple):
    """A pipeline's run of three steps: the calls of its denoiser, the latents after each step, what was decoded."""

    pipe: Any
    family: Family
    size: tuple[int, int]
    calls: list[dict[str, Any]]
    latents: list[Tensor]
    decoded: Tensor

    def grid(self, step: int) -> Tensor:
        """(b, c, h, w) of what the pipeline keeps after a step, by the pipeline's own means."""
        latents, (height, width) = self.latents[step], self.size
        if self.family.name == "flux":
            return self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        if self.family.name == "qwen-image":
            return self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)[:, :, 0]
        if self.family.name == "flux-2":
            h, w = (side // self.pipe.vae_scale_factor // 2 for side in self.size)
            ids = self.pipe._prepare_latent_ids(torch.zeros(len(latents), 1, h, w))
            return Flux2Pipeline._unpack_latents_with_ids(latents, ids)
        return latents[:, :, 0] if self.family.name == "wan" else latents


def configured(name: str, pipe: Any) -> Family:
    family = family_of(pipe)
    return replace(family, max_sequence_length=LENGTHS.get(name, LENGTHS.get(family.name)))


def sampled(name: str) -> Run:
    """A run without guidance on images that are higher than wide."""
    pipe, latents = PIPELINES[name](), []
    family = configured(name, pipe)
    side = max(8, family.divisor(pipe))  # which Stable Diffusion's pipelines demand

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"])
        return {}

    call: dict[str, Any] = {"height": 3 * side, "width": 2 * side, "num_inference_steps": 3}
    call |= UNGUIDED.get(name, UNGUIDED.get(family.name, {"guidance_scale": 1.0}))
    call |= family.sample_call | ({"num_frames": 1} if family.name == "wan" else {})
    call["generator"] = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    decode = patch.object(pipe.vae, "decode", wraps=pipe.vae.decode)
    with recorded(getattr(pipe, family.denoiser)) as calls, decode as decoded:
        pipe(prompt=list(PROMPTS), callback_on_step_end=keep, **call)
    z = decoded.call_args.args[0]
    return Run(pipe, family, (3 * side, 2 * side), calls, latents, z[:, :, 0] if z.dim() == 5 else z)


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_denoiser_is_called_as_its_pipeline_calls_it(name: str) -> None:
    run = sampled(name)
    scheduler, denoiser = run.pipe.scheduler, getattr(run.pipe, run.family.denoiser)
    embeddings = run.family.encode(run.pipe, PROMPTS)
    assert not any(torch.equal(part[0], part[1]) for part in embeddings if part.is_floating_point())
    states = placed(embeddings, torch.device("cpu"))
    time_ids = torch.tensor([[*run.size, 0, 0, *run.size]]).expand(2, -1)
    for step in (1, 2):
        theirs = run.calls[step]
        sample = run.grid(step - 1) if run.family.is_flow else theirs["sample"]
        with recorded(denoiser) as ours:
            prediction = run.family.predict(denoiser, sample, scheduler.timesteps[step].expand(2), time_ids, states)
        if run.family.is_flow:  # what the pipeline's Euler step made of its denoiser's output
            moved = (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * prediction
            torch.testing.assert_close(sample + moved, run.grid(step), rtol=1e-5, atol=1e-5)
            assert moved.abs().mean() > 1e-3
        else:
            torch.testing.assert_close(prediction, denoiser(**theirs).sample, rtol=1e-5, atol=1e-5)
            theirs["timestep"] = theirs["timestep"].expand(2)
        torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5, check_dtype=False)  # that of a timestep
    tolerance = 10 * rounding_of(run.pipe.vae)
    torch.testing.assert_close(scale_latents(run.pipe.vae, run.decoded), run.grid(-1), rtol=tolerance, atol=tolerance)


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
    embeddings = placed(PromptCache(pipe, model.family).get(PROMPTS), torch.device("cpu"))
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
        levels = levels_of_core(model.denoiser, lambda: outputs.append(model(**call)))
        for i in range(2):  # each with padding that nothing reads
            alone = {key: value[i : i + 1] for key, value in call.items() if key != "embeddings"}
            embeddings = PromptCache(model.pipe, model.family).get(PROMPTS[i : i + 1])
            single = model(**alone, embeddings=placed(embeddings, torch.device("cpu")))
            torch.testing.assert_close(single, outputs[0][i : i + 1], rtol=2e-4, atol=2e-4)
    assert levels == pytest.approx(build_objective(model.pipe.scheduler).noise_levels[INDICES].tolist(), abs=1e-6)
    assert outputs[0].shape == target.shape
    (model(**call) - target).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.trained.values())


@pytest.mark.parametrize("name", PIPELINES)
def test_default_targets_are_in_every_block(name: str) -> None:
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    targets = tuple(f".{target}" for target in family.targets)
    blocks = [
        block for block in getattr(pipe, family.denoiser).modules() if type(block).__name__.endswith("TransformerBlock")
    ]
    assert blocks
    for block in blocks:
        assert any(f".{name}".endswith(targets) for name, _ in block.named_modules()), type(block)


def test_time_ids_are_whole_numbers_in_bf16_too(monkeypatch) -> None:
    pipe, seen = FAMILY_PIPELINES["sdxl"](), []
    embed = pipe.unet.add_time_proj.forward
    monkeypatch.setattr(pipe.unet.add_time_proj, "forward", lambda ids: seen.append(ids.tolist()) or embed(ids))
    pipe.unet.to(torch.bfloat16)
    ids = [1021.0, 1533.0, 301.0, 0.0, 1024.0, 1024.0]
    embeddings = (torch.randn(1, 12, 40), torch.randn(1, 24))
    family_of(pipe).predict(pipe.unet, torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([ids]), embeddings)
    assert seen == [ids]
