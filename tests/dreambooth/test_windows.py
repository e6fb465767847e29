"""Windows of noise levels: which timesteps are drawn, and the loss that holds the base outside, written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth import LatentCache, PromptCache
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.loss import TrainingStep, windowed_schedule
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.objectives.timesteps import draw_indices, draw_noise
from nara_diffusion.noise.window import NoiseWindow
from tests.dreambooth.test_loss import CONFIG, batch_of
from tests.helpers.small_pipelines import small_sdxl

WINDOW = NoiseWindow(0.0, 0.5, hold_weight=3.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.25), (0.3, 0.7), (0.75, 1.0)])
def test_stratified_timesteps_in_a_window_take_one_stratum_of_it_each(low: float, high: float) -> None:
    windowed = windowed_schedule(build_objective(DDPMScheduler()), NoiseWindow(low, high))
    first, count, n = round(1000 * low), round(1000 * (high - low)), 10
    assert windowed.inside.tolist() == list(range(first, first + count))
    options: dict[str, Any] = {"seed": 4, "levels": 1000, "stratified": True, "group_size": n, "windowed": windowed}
    for group in draw_indices(range(40 * n), **options).reshape(40, n):
        assert sorted(((group - first) * n // count).tolist()) == list(range(n))


def test_timesteps_with_the_base_held_are_stratified_inside_and_outside() -> None:
    windowed = windowed_schedule(build_objective(DDPMScheduler()), NoiseWindow(0.4, 0.6, 1.0, outside_share=0.2))
    options: dict[str, Any] = {"seed": 4, "levels": 1000, "stratified": True, "group_size": 10, "windowed": windowed}
    for group in draw_indices(range(200), **options).reshape(20, 10):
        inside, outside = group[(group >= 400) & (group < 600)], group[(group < 400) | (group >= 600)]
        assert sorted(((inside - 400) * 8 // 200).tolist()) == list(range(8))
        rank = torch.where(outside < 400, outside, outside - 200)  # among the 800 outside
        assert sorted((rank * 2 // 800).tolist()) == [0, 1]


def test_independent_timesteps_of_a_window_are_uniform_in_it() -> None:
    windowed = windowed_schedule(build_objective(DDPMScheduler()), NoiseWindow(0.25, 0.5))
    drawn = draw_indices(range(4000), seed=2, levels=1000, windowed=windowed)
    counts = torch.bincount(drawn // 50, minlength=20)
    assert counts.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert counts[5:10].min() > 700


def test_window_of_an_edm_schedule_is_of_its_own_noise_level() -> None:
    objective = build_objective(EDMEulerScheduler())
    windowed = windowed_schedule(objective, NoiseWindow(0.2, 0.8))
    sigmas = objective.sigmas  # type: ignore[attr-defined]
    levels = sigmas / (1 + sigmas)
    assert windowed.inside.tolist() == ((levels >= 0.2) & (levels < 0.8)).nonzero().flatten().tolist()
    assert 0 < len(windowed.inside) < objective.levels


def test_window_without_a_timestep_names_the_schedules() -> None:
    objective = build_objective(DDPMScheduler())
    with pytest.raises(
        ValueError, match=r"0\.9991 and max_noise_level 0\.9999, but of the 1000 .* to 0\.999, none lies"
    ):
        windowed_schedule(objective, NoiseWindow(0.9991, 0.9999))
    with pytest.raises(ValueError, match=r"none lies outside of them for hold_base_outside"):
        windowed_schedule(objective, NoiseWindow(0.0, 0.9995, hold_weight=1.0))


def step_of(pipe: Any, model: AdaptedDenoiser, **changes: Any) -> TrainingStep:
    trained = hasattr(model, "text_encoder")
    options: dict[str, Any] = {
        "objective": build_objective(pipe.scheduler, snr_gamma=5.0),
        "latents": LatentCache(pipe.vae),
        "prompts": None if trained else PromptCache(pipe),
        "device": torch.device("cpu"),
        "seed": 9,
        "group_size": 4,
        "stratified": True,
        "prior_loss_weight": 0.4,
        "window": WINDOW,
    }
    return TrainingStep(model=model, **options | changes)


CONFIGS = {"nara": NaraConfig(**CONFIG), "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v"])}


def adapted(pipe: Any, kind: str, **options: Any) -> AdaptedDenoiser:
    """All adapter weights disturbed; in float64 but for the core, which computes in float32."""
    model = AdaptedDenoiser(pipe, CONFIGS[kind], **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def written_out(step: TrainingStep, batch: dict[str, Any], pipe: Any, base: Any) -> list[torch.Tensor]:
    """Each image's loss by its formula, one at a time: min-SNR inside, W (f − f₀)² outside; `base` has no adapters."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    losses = []
    for draw in batch["samples"]:
        t = draw_indices(
            [draw.position], seed=9, role=draw.role, levels=1000, stratified=True, group_size=4, windowed=step.windowed
        )
        latents = step.latents.sample([draw], seed=9)
        noise = draw_noise([draw.position], latents.shape[1:], seed=9, role=draw.role)
        noisy = scheduler.add_noise(latents, noise, t).double()

        def predict(of: Any, unet: Any, draw: Any = draw, noisy: Any = noisy, t: Any = t) -> torch.Tensor:
            embeds, _, pooled, _ = of.encode_prompt(draw.prompt, device="cpu", do_classifier_free_guidance=False)
            time_ids = torch.tensor([[22, 26, draw.crop.top, draw.crop.left, 16, 16]])
            conditions = {"text_embeds": pooled.double(), "time_ids": time_ids}
            return unet(noisy, t, encoder_hidden_states=embeds.double(), added_cond_kwargs=conditions).sample

        prediction = predict(pipe, step.model.unet)
        if t.item() >= 500:
            with torch.no_grad():
                target = predict(base, base.unet)
            losses.append(3.0 * (prediction - target).square().mean())
        else:
            a = scheduler.alphas_cumprod[t].double().item()
            losses.append(min(a / (1 - a), 5.0) / (a / (1 - a)) * (prediction - noise).square().mean())
    return losses


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize(("kind", "text"), [("nara", False), ("lora", False), ("nara", True)])
def test_held_base_loss_and_gradients_are_those_of_the_formula(
    folder: Path, kind: str, text: bool, prior: bool
) -> None:
    pipe, base = small_sdxl(), small_sdxl()
    base.unet.double()
    model = adapted(pipe, kind, train_text_encoder=text)
    if text:
        base.text_encoder.double()
        base.text_encoder_2.double()
    step, batch = step_of(pipe, model), batch_of(folder, prior)
    result = step(batch)
    losses = written_out(step, batch, pipe, base)
    half = len(losses) // 2 if prior else len(losses)
    per_sample = torch.stack([losses[i] + (0.4 * losses[i + half] if prior else 0) for i in range(half)])
    torch.testing.assert_close(result.per_sample.double(), per_sample, rtol=1e-5, atol=1e-9)
    assert result.split is not None
    assert result.split.held.any()
    assert not result.split.held.all()
    torch.testing.assert_close(result.split.held, result.split.noise_level >= 0.5)
    torch.testing.assert_close(result.split.weighted(3.0).double(), torch.stack(losses), rtol=1e-5, atol=1e-9)

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(per_sample.mean(), list(parameters.values()), allow_unused=True)
    result.loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(parameters)
    for parameter, gradient in zip(parameters.values(), expected, strict=True):
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item() + 1e-12)


def test_the_base_is_left_behind_as_it_was_before(folder: Path) -> None:
    pipe = small_sdxl()
    model = adapted(pipe, "nara", train_text_encoder=True)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    frozen.training = False
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    layers[1]._disable_adapters = True
    step_of(pipe, model)(batch_of(folder, prior=True))
    assert [layer.disable_adapters for layer in layers] == [False, True, *[False] * (len(layers) - 2)]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_without_holding_the_window_alone_changes_the_draws_and_nothing_else(folder: Path) -> None:
    pipe = small_sdxl()
    model = adapted(pipe, "nara")
    result = step_of(pipe, model, window=NoiseWindow(0.5, 0.75))(batch_of(folder, prior=True))
    assert ((result.noise_level >= 0.5) & (result.noise_level < 0.75)).all()
    assert result.split is None


def test_an_adapter_that_does_nothing_is_at_no_distance(folder: Path) -> None:
    pipe = small_sdxl()
    model = AdaptedDenoiser(pipe, NaraConfig(**CONFIG))  # B starts at zero
    split = step_of(pipe, model)(batch_of(folder, prior=True)).split
    assert split is not None
    assert split.held.any()
    assert split.values[split.held].max() < 1e-11  # the base sees fewer rows at once, which rounds otherwise
    assert (split.values[~split.held] > 0).all()
