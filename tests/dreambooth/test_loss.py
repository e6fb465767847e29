"""A training step against one that is written out with Diffusers' own parts, and λ where the adapter reads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth import DreamBoothDataset, LatentCache, PromptCache, collate_samples, records_from_folder
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser, predict
from nara_diffusion.dreambooth.loss import TrainingStep
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.objectives.timesteps import draw_indices, draw_noise
from tests.helpers.small_pipelines import small_sdxl

CONFIG: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["to_q", "to_v"],
    "core_hidden_dims": (7, 6),
    "noise_convention": "timestep",
}


@pytest.fixture
def pipe() -> Any:
    return small_sdxl()


def disturbed(pipe: Any, **options: Any) -> AdaptedDenoiser:
    model = AdaptedDenoiser(pipe, NaraConfig(**CONFIG), **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def batch_of(folder: Path, prior: bool) -> dict[str, Any]:
    instances = records_from_folder(folder / "instance", prompt="a photo of a toy", progress=False)
    others = records_from_folder(folder / "class", prompt="a toy", progress=False) if prior else []
    dataset = DreamBoothDataset(
        instances, [(16, 16)], batch_size=2, seed=1, class_images=others, crop="random", flip=True
    )
    return collate_samples([dataset[6], dataset[7]])


@pytest.fixture
def seen() -> list[torch.Tensor]:
    return []


@pytest.fixture
def watched(monkeypatch, seen) -> None:
    """Notes every λ that a core is asked for."""
    from nara_diffusion.cores.hypernetwork import HypernetworkCore

    forward = HypernetworkCore.forward

    def watching(self: Any, noise_level: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(noise_level.clone())
        return forward(self, noise_level, *args)

    monkeypatch.setattr(HypernetworkCore, "forward", watching)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_a_step_is_the_one_that_is_written_out(pipe, folder, watched, seen, prior, train_text_encoder) -> None:
    model = disturbed(pipe, train_text_encoder=train_text_encoder)
    batch = batch_of(folder, prior)
    step = TrainingStep(
        model=model,
        objective=build_objective(pipe.scheduler, snr_gamma=5.0),
        latents=LatentCache(pipe.vae),
        prompts=None if train_text_encoder else PromptCache(pipe),
        device=torch.device("cpu"),
        seed=11,
        group_size=2,
        stratified=True,
        noise_offset=0.1,
        prior_loss_weight=0.4,
    )
    result = step(batch)
    (levels,) = seen

    # the same from Diffusers' scheduler and pipeline; one sample at a time
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    expected, indices = [], []
    for sample in batch["samples"]:
        options: dict[str, Any] = {"seed": 11, "role": sample.role}
        t = draw_indices([sample.position], levels=1000, stratified=True, group_size=2, **options)
        indices.append(t.item())
        latents = step.latents.sample([sample], seed=11)
        noise = draw_noise([sample.position], latents.shape[1:], offset=0.1, **options)
        embeds, _, pooled, _ = pipe.encode_prompt(sample.prompt, device="cpu", do_classifier_free_guidance=False)
        time_ids = torch.tensor([[22, 26, sample.crop.top, sample.crop.left, 16, 16]])
        prediction = model.unet(
            scheduler.add_noise(latents, noise, t),
            t,
            encoder_hidden_states=embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        ).sample
        a = scheduler.alphas_cumprod[t].item()
        snr = a / (1 - a)
        expected.append(min(snr, 5.0) / snr * (prediction - noise).square().mean().item())

    half = len(indices) // 2 if prior else len(indices)
    per_sample = [expected[i] + (0.4 * expected[i + half] if prior else 0) for i in range(half)]
    assert result.per_sample.tolist() == pytest.approx(per_sample, rel=1e-4)
    assert result.loss.item() == pytest.approx(sum(per_sample) / half, rel=1e-4)
    assert len(set(indices)) == len(indices)
    torch.testing.assert_close(levels, torch.tensor(indices) / 1000)  # λ of every sample, class images included
    torch.testing.assert_close(result.noise_level, torch.tensor(indices[:half]) / 1000)


def test_gradients_reach_all_that_is_trained_and_nothing_else(pipe, folder) -> None:
    model = disturbed(pipe, train_text_encoder=True)
    step = TrainingStep(
        model, build_objective(pipe.scheduler), LatentCache(pipe.vae), None, torch.device("cpu"), seed=0
    )
    step(batch_of(folder, prior=True)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == wanted  # DistributedDataParallel waits for ever for one that never gets a gradient
    assert {name.partition(".")[0] for name in trained} == {"unet", "text_encoder", "text_encoder_2"}
    assert all("lora_" in name or "nara_core" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trainables_are_float32_whatever_the_base_is(pipe, dtype) -> None:
    model = AdaptedDenoiser(pipe.to(dtype=dtype), NaraConfig(**CONFIG), train_text_encoder=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad and p.dim() > 1} >= {dtype}


def test_a_missing_target_is_named(pipe) -> None:
    with pytest.raises(ValueError, match=r"target_modules q_proj match no module of UNet2DConditionModel.*to_k"):
        AdaptedDenoiser(pipe, NaraConfig(**{**CONFIG, "target_modules": ["to_q", "q_proj"]}))


def test_time_ids_are_whole_numbers_in_bf16_too(pipe, monkeypatch) -> None:
    seen = []
    embed = pipe.unet.add_time_proj.forward
    monkeypatch.setattr(pipe.unet.add_time_proj, "forward", lambda ids: seen.append(ids.tolist()) or embed(ids))
    pipe.unet.to(torch.bfloat16)
    ids = [1021.0, 1533.0, 301.0, 0.0, 1024.0, 1024.0]
    embeddings = (torch.randn(1, 12, 40), torch.randn(1, 24))
    predict(pipe.unet, torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([ids]), embeddings)
    assert seen == [ids]
