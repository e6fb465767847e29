"""A training step against one that is written out with Diffusers' own parts, and λ where the adapter reads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.dataset import (
    DreamBoothDataset,
    collate_samples,
    draw_indices,
    draw_noise,
    drawable_levels,
)
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.image_records import records_from_folder
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.training_step import LatentCache, PromptCache, TrainingStep
from nara_diffusion.loaders.schedulers import scheduler_fields
from nara_diffusion.noise.strength_schedule import NoiseWindow
from tests.dreambooth.pictures import folder_of
from tests.helpers.denoisers import told
from tests.helpers.small_pipelines import small_sdxl

CONFIG: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["to_q", "to_v"], "core_hidden_dims": (7, 6)}
CONFIG["noise_convention"] = "timestep"


def disturbed(pipe: Any, config: NaraConfig, **options: Any) -> AdaptedDenoiser:
    model = AdaptedDenoiser(pipe, config, **options)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.trained.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def batch_of(folder: Path, prior: bool) -> dict[str, Any]:
    """Of pictures of 22 × 26."""
    sizes = {"instance": [(26, 22)] * 3, "class": [(26, 22)] * 4}
    folders = {name: folder_of(folder / name, size) for name, size in sizes.items()}
    instances = records_from_folder(folders["instance"], prompt="a photo of a toy", progress=False)
    others = records_from_folder(folders["class"], prompt="a toy", progress=False) if prior else []
    dataset = DreamBoothDataset(
        instances, [(16, 16)], batch_size=2, seed=1, class_images=others, crop="random", flip=True
    )
    return collate_samples([dataset[6], dataset[7]])


@pytest.mark.parametrize(("prior", "train_text_encoder"), [(False, True), (True, False)])
def test_step_is_the_one_that_is_written_out(tmp_path: Path, prior: bool, train_text_encoder: bool) -> None:
    pipe = small_sdxl()
    model = disturbed(pipe, NaraConfig(**CONFIG), train_text_encoder=train_text_encoder)
    batch = batch_of(tmp_path, prior)
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
        drawable=drawable_levels(torch.arange(1000) / 1000, NoiseWindow(0.2, 0.9)),
    )
    results: list[Any] = []
    levels = told(model.unet, lambda: results.append(step(batch)))

    # the same from Diffusers' scheduler and pipeline; one sample at a time
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    expected, indices = [], []
    for sample in batch["samples"]:
        options: dict[str, Any] = {"seed": 11, "role": sample.role}
        t = draw_indices([sample.position], torch.arange(200, 900), stratified=True, group_size=2, **options)
        indices.append(t.item())
        latents = step.latents.sample([sample], seed=11)
        noise = draw_noise([sample.position], latents.shape[1:], offset=0.1, **options)
        embeds, _, pooled, _ = pipe.encode_prompt(sample.prompt, device="cpu", do_classifier_free_guidance=False)
        time_ids = torch.tensor([[22, 26, sample.top, sample.left, 16, 16]])
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        noisy = scheduler.add_noise(latents, noise, t)
        prediction = model.unet(noisy, t, encoder_hidden_states=embeds, added_cond_kwargs=conditions).sample
        a = scheduler.alphas_cumprod[t].item()
        expected.append(min(a / (1 - a), 5.0) / (a / (1 - a)) * (prediction - noise).square().mean().item())

    (result,) = results
    half = len(indices) // 2 if prior else len(indices)
    per_sample = [expected[i] + (0.4 * expected[i + half] if prior else 0) for i in range(half)]
    assert result.per_sample.tolist() == pytest.approx(per_sample, rel=1e-4)
    assert result.loss.item() == pytest.approx(sum(per_sample) / half, rel=1e-4)
    assert len(set(indices)) == len(indices)
    assert levels == pytest.approx([index / 1000 for index in indices])  # λ of every sample, class images included
    torch.testing.assert_close(result.noise_level, torch.tensor(indices[:half]) / 1000)


SCHEDULERS = {
    "timestep": EulerDiscreteScheduler(num_train_timesteps=400, beta_schedule="scaled_linear"),
    "flow": DPMSolverMultistepScheduler(400, prediction_type="flow_prediction", use_flow_sigmas=True),
}


@pytest.mark.parametrize("convention", SCHEDULERS)
def test_step_with_another_number_of_timesteps_has_its_noise_levels(tmp_path: Path, convention: str) -> None:
    """Of a flow the adapter carries the scheduler."""
    pipe, batch = small_sdxl(), batch_of(tmp_path, prior=False)
    pipe.scheduler = SCHEDULERS["timestep"]
    flow = SCHEDULERS["flow"] if convention == "flow" else None
    carried = None if flow is None else scheduler_fields(flow)
    config = NaraConfig(**CONFIG | {"noise_convention": convention, "scheduler": carried})
    model = disturbed(pipe, config, scheduler=flow)
    objective = build_objective(SCHEDULERS[convention])
    step = TrainingStep(model, objective, LatentCache(pipe.vae), PromptCache(pipe), torch.device("cpu"), seed=11)
    results: list[Any] = []
    levels = told(model.unet, lambda: results.append(step(batch)))
    drawn = draw_indices([sample.position for sample in batch["samples"]], torch.arange(400), seed=11)
    expected = (drawn + (convention == "flow")) / 400  # σ begins at 1 / N
    torch.testing.assert_close(results[0].noise_level, expected)
    torch.testing.assert_close(torch.tensor(levels), expected)
