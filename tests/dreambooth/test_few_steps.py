"""Steps, targets and trajectories against Diffusers' own schedulers and pipelines."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from nara_diffusion.dreambooth.caches import PromptCache
from nara_diffusion.dreambooth.distill import read_prompts
from nara_diffusion.dreambooth.families import Family
from nara_diffusion.dreambooth.few_steps import (
    StudentLoss,
    landings,
    make_trajectories,
    sample_latents,
    student_sampler,
    teacher_sampler,
)
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments, run_family
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.pipelines import family_of
from tests.helpers.small_pipelines import BETAS, small_flux, small_sd, small_sd3, small_sdxl

SCHEDULERS = {
    "epsilon": EulerDiscreteScheduler(**BETAS),
    "v_prediction": DDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample": DDIMScheduler(**BETAS, prediction_type="sample", set_alpha_to_one=False),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def sampler_of(kind: str, steps: int) -> Any:
    return student_sampler(SCHEDULERS[kind], steps, kind == "flow")[0]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_target_makes_sampler_land_with_the_teacher(kind: str) -> None:
    sampler = sampler_of(kind, 3)
    timesteps, factors = landings(sampler, 3)
    z, end = torch.randn(2, 2, 3, 4, 5)
    sampler.set_timesteps(3)
    assert torch.equal(timesteps, sampler.timesteps)
    for timestep, (a, b) in zip(timesteps, factors, strict=True):
        actual = sampler.step(a * z + b * end, timestep, z).prev_sample
        torch.testing.assert_close(actual, end, rtol=1e-4, atol=1e-4)


def test_a_target_is_that_of_ddim_s_formula() -> None:
    """ε = (z' − √(ᾱ' / ᾱ) z) / (√(1 − ᾱ') − √(ᾱ' (1 − ᾱ) / ᾱ)), in float64."""
    alphas = DDIMScheduler(**BETAS).alphas_cumprod.double()
    timesteps, factors = landings(sampler_of("epsilon", 4), 4)
    assert timesteps.tolist() == [999, 749, 499, 249]
    ends = [*alphas[timesteps[1:]], torch.tensor(1.0, dtype=torch.float64)]
    for here, there, factor in zip(alphas[timesteps], ends, factors, strict=True):
        d = (1 - there).sqrt() - (there * (1 - here) / here).sqrt()
        expected = torch.stack([-(there / here).sqrt() / d, 1 / d])
        torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_no_step_of_a_flow_is_idle(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in (1, 2, 4, 7):
        sampler, sampling = student_sampler(scheduler, steps, True)
        line = sampling.scheduler
        sampler.set_timesteps(steps)
        least = shift / steps / (1 + (shift - 1) / steps)  # 1 / K, shifted
        assert sampler.sigmas[-2].item() == pytest.approx(least)
        drops = -sampler.sigmas.diff()
        assert drops.min() > 0.15 / steps
        assert sampler.sigmas[0] == 1
        assert (line == "") == (steps == 1)
        pipe = SimpleNamespace(scheduler=scheduler)
        exec(line, {"pipe": pipe, "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler})
        pipe.scheduler.set_timesteps(steps)
        assert torch.equal(pipe.scheduler.sigmas, sampler.sigmas)


def test_flow_with_another_scheduler_class_is_trained() -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sampler, _ = student_sampler(scheduler, 4, True)
    sampler.set_timesteps(4)
    torch.testing.assert_close(sampler.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_teacher_passes_through_the_student_levels(kind: str) -> None:
    for steps, parts in ((1, 4), (3, 4), (4, 3), (8, 2)):
        sampler = sampler_of(kind, steps)
        timesteps, _ = landings(sampler, steps)
        fine, call = teacher_sampler(sampler, steps, parts)
        fine.set_timesteps(**(call or {"num_inference_steps": steps * parts}))
        assert len(fine.timesteps) == steps * parts
        torch.testing.assert_close(fine.timesteps[::parts], timesteps)
        assert (fine.timesteps.diff() < 0).all()
    if kind == "flow":  # of 8 steps in 2 parts: each half of a step is half of its σ
        middles = (fine.sigmas[:-2:2] + fine.sigmas[2::2]) / 2
        torch.testing.assert_close(fine.sigmas[1::2], middles)


CALL: dict[str, Any] = {"num_inference_steps": 5, "height": 16, "width": 16}


def sampling(pipe: Any) -> tuple[Any, Family, tuple[int, int, int]]:
    """A pipeline with the sampler of five steps, its family, and the shape of its latents."""
    family = family_of(pipe)
    pipe.scheduler, _ = student_sampler(pipe.scheduler, 5, family.is_flow)
    pipe.set_progress_bar_config(disable=True)
    side = 16 // pipe.vae_scale_factor
    return pipe, family, (getattr(pipe, family.denoiser).config.in_channels, side, side)


@pytest.mark.parametrize(("make", "guidance_scale"), [(small_sd, 3.5), (small_sdxl, 1.0), (small_sd3, 4.0)])
def test_latents_match_each_step_of_the_pipeline(make: Any, guidance_scale: float) -> None:
    pipe, family, shape = sampling(make())
    noise, prompts = torch.randn(2, *shape), ["a photo of toy", "red cube on grass"]
    call = {**CALL, **family.sample_call, "guidance_scale": guidance_scale}
    path = sample_latents(pipe, prompts, noise, call)
    assert path.shape == (2, 6, *shape)
    assert torch.equal(path[:, 0], noise)
    expected = pipe(prompts, latents=noise, output_type="latent", **call).images
    torch.testing.assert_close(path[:, -1], expected)
    denoiser, ids = getattr(pipe, family.denoiser), torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)
    pipe.scheduler.set_timesteps(5)
    z = noise
    for number, timestep in enumerate(pipe.scheduler.timesteps):
        with torch.no_grad():
            embeddings, empty = family.encode(pipe, prompts), family.encode(pipe, ["", ""])
            y = family.predict(denoiser, z, timestep.expand(2), ids, embeddings)
            base = family.predict(denoiser, z, timestep.expand(2), ids, empty)
        y = base + guidance_scale * (y - base)
        z = pipe.scheduler.step(y, timestep, z).prev_sample
        torch.testing.assert_close(path[:, number + 1], z, rtol=1e-3, atol=1e-3)


def test_trajectories_are_made_once_by_their_numbers(tmp_path: Any) -> None:
    accelerator, requests = Accelerator(cpu=True), []

    def sample(indices: Any) -> torch.Tensor:
        requests.append(list(indices))
        return torch.tensor(indices)[:, None] * torch.ones(5)

    count = make_trajectories(sample, 3, 2, tmp_path / "a" / "b", accelerator)
    assert torch.equal(count, torch.arange(3)[:, None] * torch.ones(5))
    assert requests == [[0, 1], [2]]
    assert torch.equal(make_trajectories(sample, 3, 2, tmp_path / "a" / "b", accelerator), count)
    assert len(requests) == 2


class Fixed(torch.nn.Module):
    """A denoiser that predicts `value` whatever it is given."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value, self.timestep = value, torch.empty(0)

    def forward(self, sample: Any, timestep: Any, time_ids: Any, embeddings: Any) -> torch.Tensor:
        self.timestep = timestep
        return self.value


def loss_of(pipe: Any, family: Family, paths: torch.Tensor, prompts: list[str], base: torch.Tensor) -> StudentLoss:
    timesteps, factors = landings(pipe.scheduler, len(base))
    source, cache = build_objective(pipe.scheduler).source, PromptCache(pipe, family)
    ids = torch.tensor([[16, 16, 0, 0, 16, 16]])
    denoiser = getattr(pipe, family.denoiser)
    return StudentLoss(denoiser, paths, prompts, timesteps, factors, base, source, cache, ids, batch_size=2)


def test_loss_is_target_error_over_base_error() -> None:
    pipe, family, shape = sampling(small_sdxl())
    paths, base = torch.randn(4, 4, *shape), torch.tensor([0.5, 2.0, 4.0])
    model = Fixed(torch.randn(3, *shape))
    loss = replace(loss_of(pipe, family, paths, ["a", "b", "c", "d"], base), model=model)
    cells = [(3, 0), (0, 2), (2, 1)]
    actual = loss([{"trajectory": number, "position": step + 3 * number} for number, step in cells])
    for row, (number, step) in enumerate(cells):
        a, b = loss.landings[step]
        error = (model.value[row] - a * paths[number, step] - b * paths[number, step + 1]).square().mean()
        torch.testing.assert_close(actual.per_sample[row], error / base[step], rtol=1e-4, atol=1e-5)
        assert model.timestep[row] == loss.timesteps[step]
        assert actual.noise_level[row].item() == pytest.approx(loss.timesteps[step].item() / 1000)
    torch.testing.assert_close(actual.loss, actual.per_sample.mean())


@pytest.mark.parametrize("make", [small_sdxl, small_sd3])
def test_errors_are_shares_of_the_bases(make: Any) -> None:
    pipe, family, shape = sampling(make())
    prompts, base = ["a toy", "red cube", "on grass"], torch.tensor([0.5, 2.0])
    paths = torch.randn(3, 3, *shape)
    loss, accelerator = loss_of(pipe, family, paths, prompts, base), Accelerator(cpu=True)
    actual = loss.curve(pipe, accelerator)
    denoiser, ids = getattr(pipe, family.denoiser), torch.tensor([[16, 16, 0, 0, 16, 16]] * 3)
    for step in range(2):
        with torch.no_grad():
            embeddings, timestep = family.encode(pipe, prompts), loss.timesteps[step].expand(3)
            y = family.predict(denoiser, paths[:, step], timestep, ids, embeddings)
        a, b = loss.landings[step]
        expected = (y - a * paths[:, step] - b * paths[:, step + 1]).square().mean((1, 2, 3)) / base[step]
        torch.testing.assert_close(actual[step], expected, rtol=1e-3, atol=1e-4)


def test_prompts_are_lines_and_other_families_are_refused(tmp_path: Any) -> None:
    (tmp_path / "prompts.txt").write_text("a toy\n\n  red cube \n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a toy", "red cube"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="contains no prompts"):
        read_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="can't be read"):
        read_prompts(str(tmp_path / "missing.txt"))
    args = DreamBoothArguments(pretrained_model_name_or_path="none", distill_to=2, prompts_file="none")
    with pytest.raises(ValueError, match=r"--distill_to is 2, but FLUX\.1 chooses its own timesteps or guidance"):
        run_family(args, small_flux())
