"""A training step against one that is written out with Diffusers' own parts, and λ where the adapter reads it.

And draws, which have the distributions that they promise, within windows too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.caches import LatentCache, PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.draws import draw_indices, draw_noise, drawable_levels, numpy_generator, torch_generator
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.source_images import records_from_folder
from nara_diffusion.dreambooth.training_step import TrainingStep
from nara_diffusion.noise.level import NoiseWindow
from tests.dreambooth.pictures import folder_of
from tests.helpers.adapted import disturb
from tests.helpers.denoisers import levels_of_core
from tests.helpers.small_pipelines import small_sdxl

CONFIG: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["to_q", "to_v"], "core_hidden_dims": (7, 6)}
CONFIG["noise_convention"] = "timestep"


def disturbed(pipe: Any, config: NaraConfig, **options: Any) -> AdaptedDenoiser:
    model = AdaptedDenoiser(pipe, config, **options)
    disturb(model, scale=0.3)
    return model.eval()


def batch_of(folder: Path, prior: bool) -> dict[str, Any]:
    """Of pictures of 22 × 26."""
    sizes = {"instance": [(26, 22)] * 3, "class": [(26, 22)] * 4}
    folders = {name: folder_of(folder / name, size) for name, size in sizes.items()}
    instances = records_from_folder(folders["instance"], prompt="a photo of a toy", progress=False)
    class_records = records_from_folder(folders["class"], prompt="a toy", progress=False) if prior else []
    dataset = DreamBoothDataset(
        instances, [(16, 16)], batch_size=2, seed=1, class_images=class_records, crop="random", flip=True
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
    levels = levels_of_core(model.unet, lambda: results.append(step(batch)))

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
def test_step_with_other_timestep_count_has_its_levels(tmp_path: Path, convention: str) -> None:
    pipe, batch = small_sdxl(), batch_of(tmp_path, prior=False)
    pipe.scheduler = SCHEDULERS[convention]
    model = disturbed(pipe, NaraConfig(**CONFIG | {"noise_convention": convention}))
    objective = build_objective(pipe.scheduler)
    step = TrainingStep(model, objective, LatentCache(pipe.vae), PromptCache(pipe), torch.device("cpu"), seed=11)
    results: list[Any] = []
    levels = levels_of_core(model.unet, lambda: results.append(step(batch)))
    drawn = draw_indices([sample.position for sample in batch["samples"]], torch.arange(400), seed=11)
    expected = (drawn + (convention == "flow")) / 400  # σ begins at 1 / N
    torch.testing.assert_close(results[0].noise_level, expected)
    torch.testing.assert_close(torch.tensor(levels), expected)


# ---------------------------------------------------------------------- draws

STRATIFIED: dict[str, Any] = {"seed": 4, "stratified": True}


def test_random_numbers_depend_on_seed_stream_and_index() -> None:
    keys = [(7, "noise", 5), (8, "noise", 5), (7, "crop", 5), (7, "noise", 6), (5, "noise", 7)]
    assert len({float(torch.randn((), generator=torch_generator(*key))) for key in keys}) == len(keys)
    assert len({float(numpy_generator(*key).random()) for key in keys}) == len(keys)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 0.7)])
def test_stratified_indices_cover_each_stratum_once(low: float, high: float) -> None:
    objective = build_objective(DDPMScheduler())
    levels = drawable_levels(objective.noise_levels, NoiseWindow(low, high))
    first, count, n = round(1000 * low), round(1000 * (high - low)), 10
    assert levels.tolist() == list(range(first, first + count))
    for group in draw_indices(range(40 * n), levels, **STRATIFIED, group_size=n).reshape(40, n):
        assert sorted(((group - first) * n // count).tolist()) == list(range(n))


def test_window_without_levels_is_refused_with_the_schedules() -> None:
    with pytest.raises(ValueError, match=r"1000 noise levels from .* to 0\.999, and none .* 0\.9991 and .* 0\.9999"):
        drawable_levels(build_objective(DDPMScheduler()).noise_levels, NoiseWindow(0.9991, 0.9999))


@pytest.mark.parametrize(
    ("scheme", "density", "window"),
    [
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}, NoiseWindow(0.3, 0.8)),
        ("logit_normal", {"logit_mean": 0.7, "logit_std": 0.5}, NoiseWindow()),
        ("mode", {"mode_scale": 1.29}, NoiseWindow()),
        ("mode", {"mode_scale": -0.8}, NoiseWindow(0.3, 0.8)),
    ],
    ids=str,
)
def test_levels_are_drawn_as_often_as_in_diffusers(scheme: str, density: dict, window) -> None:
    """They take scheduler.timesteps[⌊u N⌋], of which the first is pure noise."""
    count, n = 1_000_000, 10
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=n)
    u = compute_density_for_timestep_sampling(scheme, count, generator=torch.Generator().manual_seed(3), **density)
    theirs = torch.bincount(scheduler.timesteps[(u * n).long()].long() - 1, minlength=n).double()
    objective = build_objective(scheduler)
    theirs[~window.contains(objective.noise_levels)] = 0
    levels = drawable_levels(objective.noise_levels, window, scheme, **density)
    drawn = draw_indices(range(4000), levels, **STRATIFIED, group_size=4000)
    ours = torch.bincount(drawn, minlength=n).double()
    torch.testing.assert_close(ours / ours.sum(), theirs / theirs.sum(), rtol=0, atol=4e-3)
    assert (ours[ours > 0] / ours.sum() - 1 / (ours > 0).sum()).abs().max() > 0.01


def test_noise_is_normal_and_offset_shifts_channels() -> None:
    noise = draw_noise(range(400), (2, 4, 4), seed=3)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert (torch.corrcoef(noise[:40].flatten(1)).triu(1).abs() < 0.75).all()
    assert not torch.isclose(noise, draw_noise(range(400), (2, 4, 4), seed=3, role="class"), atol=1e-5).all(-1).any()
    shift = draw_noise(range(400), (2, 4, 4), seed=3, offset=0.3) - noise  # the same ε, and one δ a channel
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.3, abs=0.03)
    assert abs(torch.corrcoef(shift[:, :, 0, 0].T)[0, 1].item()) < 0.15
