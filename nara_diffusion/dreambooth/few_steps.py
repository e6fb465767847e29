"""Few-step sampling: the student's and the teacher's steps, and a student's target.

A step of DDIM (arXiv 2010.02502, η = 0), or of Euler's method on a rectified flow, is linear in the
latents z and the prediction y: z' = c z + d y. Solving for y gives the prediction that leads to a
given z'. This is the target of a student that takes the whole step at once:

    y = (z' − c z) / d
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from .families import Family

FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3")
"""The families that use plain classifier-free guidance and the sampler's own timesteps."""
DDIM = {"timestep_spacing": "trailing", "clip_sample": False}
"""The settings of DDIM. Trailing timesteps start at pure noise, and the timesteps of K steps are
among those of any multiple of K steps."""


def check_family(family: Family) -> None:
    """Raise ValueError for a family that can't be distilled."""
    if family.name not in FAMILIES:
        raise ValueError(
            f"distill_to teaches Stable Diffusion 1, 2, XL and 3, and this model is {family.title}, "
            "which has timesteps or a guidance of its own: leave distill_to out."
        )


def student_sampler(scheduler: Any, steps: int, is_flow: bool) -> tuple[Any, str]:
    """Return the deterministic sampler of K steps, and the code that sets it in a pipeline.

    The code is empty if the model's own scheduler is that sampler. By default, the last of K steps
    of Euler's method starts at σ of about 0.001 and changes nothing. With `shift_terminal` it
    starts at 1/K, shifted as the scheduler shifts every σ.
    """
    kind, options = DDIMScheduler, DDIM
    if is_flow:
        shift = float(scheduler.config.get("shift", 1.0))
        kind, options = FlowMatchEulerDiscreteScheduler, {}
        if steps > 1:
            options = {"shift_terminal": shift / (steps - 1 + shift)}
    sampler = kind.from_config(scheduler.config, **options)
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    line = f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config{given})"
    return sampler, line if options else ""


def teacher_sampler(sampler: Any, steps: int, parts: int) -> tuple[Any, dict[str, Any]]:
    """Return a sampler that takes `parts` steps for each of K steps, and arguments for its call."""
    if isinstance(sampler, DDIMScheduler):
        return sampler, {"num_inference_steps": steps * parts}
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
    found = []
    for timestep in sampler.timesteps:
        c, d = sampler.step(y, timestep, z).prev_sample.tolist()
        found.append([-c / d, 1 / d])
    return sampler.timesteps, torch.tensor(found)
