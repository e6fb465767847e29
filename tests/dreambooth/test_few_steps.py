"""Steps, targets and trajectories against Diffusers' own schedulers and pipelines."""

from __future__ import annotations

import itertools
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
from nara_diffusion.dreambooth.few_steps import advance, check_family, landing, levels_of, sampler_line, sampler_of
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.pipelines import family_of
from nara_diffusion.dreambooth.student import StepErrors, StudentLoss
from nara_diffusion.dreambooth.trajectories import Segments, Teacher, collate_segments, make_trajectories, read_prompts
from tests.helpers.small_pipelines import BETAS, small_flux, small_sd, small_sd3, small_sdxl

SCHEDULERS = {
    "epsilon": EulerDiscreteScheduler(**BETAS),
    "v_prediction": DDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample": DDIMScheduler(**BETAS, prediction_type="sample", set_alpha_to_one=False),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_steps_are_those_of_diffusers_sampler(kind: str) -> None:
    scheduler = SCHEDULERS[kind]
    objective = build_objective(scheduler)
    sampler = sampler_of(scheduler, objective, 5)
    levels = levels_of(sampler, objective, 5)
    own = type(sampler).from_config(sampler.config)
    own.set_timesteps(5)
    z = torch.randn(2, 3, 4, 5)
    for timestep, here, there in zip(own.timesteps, levels[:-1], levels[1:], strict=True):
        assert here.timestep == pytest.approx(timestep.item(), rel=1e-6)
        y = torch.randn(z.shape)
        expected = own.step(y, timestep, z).prev_sample
        z = advance(z, y, here, there)
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_no_step_of_a_flow_is_idle(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = build_objective(scheduler)
    for steps in (1, 2, 4, 7):
        sampler = sampler_of(scheduler, objective, steps)
        sampler.set_timesteps(steps)
        least = shift / steps / (1 + (shift - 1) / steps)  # 1 / K, shifted
        assert sampler.sigmas[-2].item() == pytest.approx(least)
        drops = -sampler.sigmas.diff()
        assert drops.min() > 0.15 / steps
        assert sampler.sigmas[0] == 1
        line = sampler_line(scheduler, objective, steps)
        assert (line == "") == (steps == 1)
        pipe = SimpleNamespace(scheduler=scheduler)
        exec(line, {"pipe": pipe, "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler})
        pipe.scheduler.set_timesteps(steps)
        assert torch.equal(pipe.scheduler.sigmas, sampler.sigmas)


def test_a_flow_with_a_scheduler_of_another_class_is_taught_too() -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sampler = sampler_of(scheduler, build_objective(scheduler), 4)
    sampler.set_timesteps(4)
    torch.testing.assert_close(sampler.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_target_lands_where_the_teacher_lands(kind: str) -> None:
    objective = build_objective(SCHEDULERS[kind])
    levels = levels_of(sampler_of(SCHEDULERS[kind], objective, 3), objective, 3)
    z, end = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    for here, there in itertools.pairwise(levels):
        a, b = landing(here, there)
        torch.testing.assert_close(advance(z, a * z + b * end, here, there), end)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_teacher_passes_through_the_student_levels(kind: str) -> None:
    objective = build_objective(SCHEDULERS[kind])
    for steps, parts in ((1, 4), (3, 4), (4, 3), (8, 2)):
        sampler = sampler_of(SCHEDULERS[kind], objective, steps)
        fine = levels_of(sampler, objective, steps, parts)
        assert len(fine) == steps * parts + 1
        assert fine[::parts] == levels_of(sampler, objective, steps)
        assert [level.timestep for level in fine] == sorted({level.timestep for level in fine}, reverse=True)


def teacher_of(pipe: Any, guidance_scale: float) -> tuple[Teacher, Any, Any]:
    objective = build_objective(pipe.scheduler)
    pipe.scheduler = sampler_of(pipe.scheduler, objective, 5)
    pipe.set_progress_bar_config(disable=True)
    return Teacher(pipe, family_of(pipe), guidance_scale, 16, 2), objective, pipe.scheduler


@pytest.mark.parametrize(
    ("make", "guidance_scale"), [(small_sd, 3.5), (small_sdxl, 2.5), (small_sdxl, 1.0), (small_sd3, 4.0)]
)
def test_the_teacher_samples_as_the_pipeline_does(make: Any, guidance_scale: float) -> None:
    teacher, objective, sampler = teacher_of(make(), guidance_scale)
    levels = levels_of(sampler, objective, 5)
    noise, prompts = torch.randn(2, *teacher.shape), ["a photo of toy", "red cube on grass"]
    path = teacher.sample(noise, prompts, levels)
    call = {"num_inference_steps": 5, "guidance_scale": guidance_scale, "height": 16, "width": 16}
    call |= teacher.family.sample_call
    with torch.no_grad():
        expected = teacher.pipe(prompt=prompts, latents=noise, output_type="latent", **call).images
    assert [len(z) for z in path] == [2] * 6
    torch.testing.assert_close(path[-1], expected, rtol=1e-3, atol=1e-3)


def test_trajectories_are_made_once_and_depend_on_prompt_and_number_only(tmp_path: Any) -> None:
    teacher, objective, sampler = teacher_of(small_sdxl(), 2.0)
    fine, prompts = levels_of(sampler, objective, 2, 3), ["a toy", "red cube", "a toy"]
    accelerator = Accelerator(cpu=True)
    made = make_trajectories(teacher, prompts, fine, 3, 5, tmp_path / "a", accelerator)
    assert made.shape == (3, 3, *teacher.shape)
    noise = made[1:2, 0]
    alone = torch.stack(teacher.sample(noise, prompts[1:2], fine)[::3], 1)
    torch.testing.assert_close(made[1:2], alone, rtol=1e-3, atol=1e-4)
    assert not torch.equal(made[0, 0], made[2, 0])
    again = make_trajectories(teacher, [], [], 3, 5, tmp_path / "a", accelerator)
    assert torch.equal(again, made)


def test_each_step_of_the_data_is_as_frequent_and_each_trajectory_comes_once_a_pass() -> None:
    data = Segments(trajectories=6, steps=4, seed=3)
    batch = collate_segments([data[position] for position in range(24)])
    assert batch["step"] == list(range(4)) * 6
    for epoch in torch.tensor(batch["trajectory"]).split(6):
        assert sorted(epoch.tolist()) == list(range(6))


class Fixed(torch.nn.Module):
    """A denoiser that predicts `value` whatever it is given."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value, self.timestep = value, torch.empty(0)

    def forward(self, sample: Any, timestep: Any, time_ids: Any, embeddings: Any) -> torch.Tensor:
        self.timestep = timestep
        return self.value


def test_the_loss_is_the_error_to_the_target_over_the_base_error() -> None:
    teacher, objective, sampler = teacher_of(small_sdxl(), 2.0)
    levels = levels_of(sampler, objective, 3)
    paths = torch.randn(4, 4, *teacher.shape)
    cache = PromptCache(teacher.pipe, teacher.family)
    model, base = Fixed(torch.randn(3, *teacher.shape)), torch.tensor([0.5, 2.0, 4.0])
    loss = StudentLoss(model, paths, ["a", "b", "c", "d"], levels, base, objective.source, cache, teacher)
    found = loss({"trajectory": [3, 0, 2], "step": [0, 2, 1]})
    for row, (number, step) in enumerate([(3, 0), (0, 2), (2, 1)]):
        a, b = landing(levels[step], levels[step + 1])
        error = (model.value[row] - a * paths[number, step] - b * paths[number, step + 1]).square().mean()
        torch.testing.assert_close(found.per_sample[row], error / base[step], rtol=1e-4, atol=1e-5)
        assert model.timestep[row] == levels[step].timestep
        assert found.noise_level[row].item() == pytest.approx(levels[step].timestep / 1000)
    torch.testing.assert_close(found.loss, found.per_sample.mean())


def test_errors_are_shares_of_the_base_and_the_end_is_that_of_the_sampler() -> None:
    teacher, objective, sampler = teacher_of(small_sdxl(), 3.0)
    levels, prompts = levels_of(sampler, objective, 2), ["a toy", "red cube", "on grass"]
    paths = torch.randn(3, 3, *teacher.shape)
    cache = PromptCache(teacher.pipe, teacher.family)
    loss = StudentLoss(teacher.pipe.unet, paths, prompts, levels, torch.ones(2), objective.source, cache, teacher)
    errors = StepErrors(loss, batch_size=2)
    found = errors.errors(teacher.pipe, Accelerator(cpu=True))
    student = Teacher(teacher.pipe, teacher.family, 1.0, 16, 2)
    for step in range(2):
        y = student.predict(paths[:, step], levels[step], student.embeddings(prompts))
        a, b = landing(levels[step], levels[step + 1])
        expected = (y - a * paths[:, step] - b * paths[:, step + 1]).square().mean((1, 2, 3))
        torch.testing.assert_close(found[step], expected, rtol=1e-3, atol=1e-4)
    end = student.sample(paths[:, 0], prompts, levels)[-1]
    assert errors.end_error(teacher.pipe) == pytest.approx((end - paths[:, 2]).square().mean().item(), rel=1e-4)


def test_prompts_are_lines_and_other_families_are_refused(tmp_path: Any) -> None:
    (tmp_path / "prompts.txt").write_text("a toy\n\n  red cube \n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a toy", "red cube"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="can't be read"):
        read_prompts(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match=r"FLUX\.1, which has timesteps or a guidance of its own"):
        check_family(family_of(small_flux()))
