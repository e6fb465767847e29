"""A step of training in each family: gradients under checkpointing, one sample at a time, and the caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.cache import PromptCache, scale_latents
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.families.table import family_of
from nara_diffusion.dreambooth.objectives import build_objective
from tests.helpers.denoisers.adapted import told
from tests.helpers.pipelines.families import FAMILY_PIPELINES

PROMPTS = ["a toy", "a red toy on grass"]
LENGTHS = {"sd3": 5, "flux": 12, "flux2": 64, "z_image": 96, "qwen_image": 300, "wan": 20}
INDICES = torch.tensor([150, 800])


def trained(name: str, *, gradient_checkpointing: bool = False) -> AdaptedDenoiser:
    """With an adapter whose weights all differ from those of their start."""
    pipe = FAMILY_PIPELINES[name]()
    family = family_of(pipe).with_conditions(max_sequence_length=LENGTHS.get(name))
    convention = build_objective(pipe.scheduler).source.convention
    targets = ["to_q", "to_v"]
    config = NaraConfig(
        r=2, target_modules=targets, core_hidden_dims=(4, 4), core_init="kaiming", noise_convention=convention
    )
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    torch.manual_seed(2)
    model = AdaptedDenoiser(pipe, config, gradient_checkpointing=gradient_checkpointing, family=family)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def inputs(model: AdaptedDenoiser) -> tuple[dict[str, Any], Tensor]:
    """Of a batch of two, at unequal noise levels and with prompts of unequal lengths; and the target."""
    pipe, generator = model.pipe, torch.Generator().manual_seed(4)
    channels = pipe.vae.config.get("latent_channels") or pipe.vae.config.z_dim
    latents = scale_latents(pipe.vae, torch.randn(2, channels, 8, 4, generator=generator))
    objective = build_objective(pipe.scheduler)
    corrupted = objective.corrupt(latents, torch.randn(latents.shape, generator=generator), INDICES)
    with torch.no_grad():
        embeddings = PromptCache(pipe, model.family).get(PROMPTS)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
    call = {"sample": corrupted.model_input, "timestep": corrupted.timestep, "time_ids": ids, "embeddings": embeddings}
    return call, corrupted.target


def gradients(model: AdaptedDenoiser) -> dict[str, Tensor]:
    call, target = inputs(model)
    (model(**call) - target).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("name", FAMILY_PIPELINES)
def test_checkpointing_leaves_gradients_as_they_are(name: str) -> None:
    model = trained(name)
    plain, again = gradients(model), gradients(trained(name, gradient_checkpointing=True))
    assert plain.keys() == again.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
        assert value.abs().max() > 0


@pytest.mark.parametrize("name", FAMILY_PIPELINES)
@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    """Each at its own λ, and with padding that nothing reads."""
    model = trained(name).eval()
    call, target = inputs(model)
    both = model(**call)
    assert both.shape == target.shape
    for i in range(2):
        alone = {key: value[i : i + 1] for key, value in call.items() if key != "embeddings"}
        embeddings = PromptCache(model.pipe, model.family).get(PROMPTS[i : i + 1])
        torch.testing.assert_close(model(**alone, embeddings=embeddings), both[i : i + 1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", FAMILY_PIPELINES)
def test_the_adapter_is_told_the_objective_s_noise_level(name: str) -> None:
    model = trained(name).eval()
    call, _ = inputs(model)
    objective = build_objective(model.pipe.scheduler)
    with torch.no_grad():
        levels = told(model.denoiser, lambda: model(**call))
    expected = objective.source.noise_level(call["timestep"]).tolist()
    assert levels == pytest.approx(expected, abs=1e-6)
    assert expected[0] < 0.5 < expected[1]
