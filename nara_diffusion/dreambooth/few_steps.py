"""Few-step sampling: the student's and the teacher's steps, and the student's targets.

A step of DDIM (arXiv 2010.02502, η = 0), or of Euler's method on a rectified flow, is linear in the
latents z and the prediction y: z' = c z + d y. Solving for y gives the prediction that leads to a
given z'. This is the target of a student that takes the whole step at once:

    y = (z' − c z) / d
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from nara_diffusion.tuner.usage import FewStepSampling

from .families import Family

FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3")
"""The families that use plain classifier-free guidance and the sampler's own timesteps."""
DDIM: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False}
"""The settings of DDIM. Trailing timesteps start at pure noise, and the timesteps of K steps are
among those of any multiple of K steps."""


def check_family(family: Family) -> None:
    """Raise ValueError for a family that can't be distilled."""
    if family.name not in FAMILIES:
        raise ValueError(
            "--distill_to supports Stable Diffusion 1, 2, XL and 3. This model is "
            f"{family.title}, which chooses its own timesteps or guidance: leave --distill_to out."
        )


@dataclass(frozen=True)
class FewSteps:
    """K steps of a student, and those of its teacher between them."""

    sampling: FewStepSampling  # the student's, as its file and its model card say it
    scheduler: Any  # of the student
    timesteps: Tensor  # (K,)
    landings: Tensor  # (K, 2), of `landings`
    teacher_scheduler: Any
    teacher_call: dict[str, Any]  # further arguments of the teacher's call
    parts: int  # the teacher's steps for each of the student's


def few_steps_of(scheduler: Any, steps: int, teacher_steps: int, is_flow: bool) -> FewSteps:
    """Return the `steps` of a student of the model with `scheduler`.

    Args:
        teacher_steps: the teacher's steps, a multiple of `steps`.
        is_flow: whether the model is a rectified flow.
    """
    sampler, code = student_sampler(scheduler, steps, is_flow)
    timesteps, factors = landings(sampler, steps)
    parts = teacher_steps // steps
    sampling = FewStepSampling(
        num_inference_steps=steps,
        timesteps=timesteps.tolist(),
        scheduler=code,
        timestep_spacing=sampler.config.get("timestep_spacing"),
        shift_terminal=sampler.config.get("shift_terminal"),
    )
    teacher = teacher_sampler(sampler, steps, parts)
    return FewSteps(sampling, sampler, timesteps, factors, *teacher, parts)


def student_sampler(scheduler: Any, steps: int, is_flow: bool) -> tuple[Any, str]:
    """Return the deterministic sampler of K steps, and the code that sets it in a pipeline.

    The code is empty if the model's own scheduler is that sampler. By default, the last of K steps
    of Euler's method starts at σ of about 0.001 and changes nothing. With `shift_terminal` it
    starts at 1/K, shifted as the scheduler shifts every σ.
    """
    kind: Any = DDIMScheduler
    options = DDIM
    if is_flow:
        shift = float(scheduler.config.get("shift", 1.0))
        kind, options = FlowMatchEulerDiscreteScheduler, {}
        if steps > 1:
            options = {"shift_terminal": shift / (steps - 1 + shift)}
    sampler = kind.from_config(scheduler.config, **options)
    settings = "".join(f", {name}={value!r}" for name, value in options.items())
    line = f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config{settings})"
    return sampler, line if options else ""


def teacher_sampler(sampler: Any, steps: int, parts: int) -> tuple[Any, dict[str, Any]]:
    """Return the sampler that takes `parts` steps for each of K, and more arguments of its call."""
    if isinstance(sampler, DDIMScheduler):
        return sampler, {}
    sampler.set_timesteps(steps)
    places = np.arange(steps * parts) / parts
    sigmas = np.interp(places, range(steps + 1), sampler.sigmas)
    unshifted = type(sampler).from_config(sampler.config, shift=1.0, shift_terminal=None)
    return unshifted, {"sigmas": sigmas.tolist()}


def landings(sampler: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Return the timesteps (K,) of K steps, and (a, b) of each step, (K, 2) float32.

    The prediction a z + b z' makes the step lead from z to z'.
    """
    sampler.set_timesteps(steps)
    z, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    factors = []
    for timestep in sampler.timesteps:
        c, d = sampler.step(y, timestep, z).prev_sample.tolist()
        factors.append([-c / d, 1 / d])
    return sampler.timesteps, torch.tensor(factors)
