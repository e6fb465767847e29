"""Few-step sampling: the levels of a deterministic sampler, its step, and a student's target.

At a level the denoiser sees z = p x + q ε and predicts y = α x + β ε (`objectives`). A step of DDIM
(arXiv 2010.02502, η = 0), or of Euler's method on a rectified flow, goes from a level with (p, q)
to one with (p', q') with D = p β − q α:

    x̂ = (β z − q y) / D        ε̂ = (p y − α z) / D        z' = p' x̂ + q' ε̂

Solving for y gives the prediction that leads to a given z'. This is the target of a student that
takes the whole step at once:

    y = (D z' − (p' β − q' α) z) / (p q' − q p')
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from nara_diffusion.noise.prediction import FLOW

from .families import Family
from .objectives import Objective

FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3")
"""The families that use plain classifier-free guidance and the sampler's own timesteps."""
DDIM = {"timestep_spacing": "trailing", "clip_sample": False}
"""The settings of DDIM. Trailing timesteps start at pure noise, and the timesteps of K steps are
among those of any multiple of K steps."""


@dataclass(frozen=True)
class Level:
    """A noise level of a path. At the last level the denoiser isn't called, and α and β are 0."""

    timestep: float
    p: float
    q: float
    alpha: float = 0.0
    beta: float = 0.0


def check_family(family: Family) -> None:
    """Raise ValueError for a family that can't be distilled."""
    if family.name not in FAMILIES:
        raise ValueError(
            f"distill_to teaches Stable Diffusion 1, 2, XL and 3, and this model is {family.title}, "
            "which has timesteps or a guidance of its own: leave distill_to out."
        )


def sampler_of(scheduler: Any, objective: Objective, steps: int) -> Any:
    """Return the deterministic sampler of a model: DDIM, or Euler's method for a rectified flow."""
    options = _sampler_options(scheduler, objective, steps)
    return _sampler_class(objective).from_config(scheduler.config, **options)


def sampler_line(scheduler: Any, objective: Objective, steps: int) -> str:
    """Return the code that sets the sampler of `sampler_of`; empty if the model has it already."""
    given = _sampler_options(scheduler, objective, steps)
    if not given:
        return ""
    options = ", ".join(f"{name}={value!r}" for name, value in given.items())
    name = _sampler_class(objective).__name__
    return f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, {options})"


def _sampler_class(objective: Objective) -> Any:
    is_flow = objective.prediction_type == FLOW
    return FlowMatchEulerDiscreteScheduler if is_flow else DDIMScheduler


def _sampler_options(scheduler: Any, objective: Objective, steps: int) -> dict[str, Any]:
    """Return the settings that differ from the model's own scheduler.

    By default, the last of K steps of Euler's method starts at σ of about 0.001 and changes
    nothing. With `shift_terminal` it starts at 1/K, shifted as the scheduler shifts every σ.
    """
    if objective.prediction_type != FLOW:
        return DDIM
    if steps == 1:
        return {}
    shift = float(scheduler.config.get("shift", 1.0))
    return {"shift_terminal": shift / (steps - 1 + shift)}


def levels_of(sampler: Any, objective: Objective, steps: int, parts: int = 1) -> list[Level]:
    """Return the steps · parts + 1 levels of `steps` steps, each split into `parts`.

    The first level and every `parts`-th level after it are the levels of a pipeline that samples in
    `steps` steps with `sampler`. If N, the length of the schedule, isn't a multiple of the number
    of steps, a step of DDIM ends one timestep away from the next level.
    """
    if objective.prediction_type == FLOW:
        return _flow_levels(sampler, steps, parts)
    sampler.set_timesteps(steps * parts)
    levels = []
    for timestep in sampler.timesteps.tolist():
        numbers = (objective.p, objective.q, objective.alpha, objective.beta)
        levels.append(Level(timestep, *(values[timestep].item() for values in numbers)))
    clean = float(sampler.final_alpha_cumprod)
    return [*levels, Level(0, clean**0.5, (1 - clean) ** 0.5)]


def _flow_levels(sampler: Any, steps: int, parts: int) -> list[Level]:
    sampler.set_timesteps(steps)
    ends = sampler.sigmas.double().tolist()  # steps + 1, the last is 0
    sigmas = []
    for here, there in itertools.pairwise(ends):
        sigmas += [here + (there - here) * part / parts for part in range(parts)]
    length = sampler.config.num_train_timesteps
    levels = [Level(length * sigma, 1 - sigma, sigma, -1.0, 1.0) for sigma in sigmas]
    return [*levels, Level(0, 1.0, 0.0)]


def advance(z: Tensor, y: Tensor, here: Level, there: Level) -> Tensor:
    """Return z' (b, c, h, w) after a step from `here` to `there`; z and y are (b, c, h, w)."""
    determinant = here.p * here.beta - here.q * here.alpha
    on_z = (there.p * here.beta - there.q * here.alpha) / determinant
    on_y = (there.q * here.p - there.p * here.q) / determinant
    return on_z * z + on_y * y


def landing(here: Level, there: Level) -> tuple[float, float]:
    """Return (a, b) such that the prediction a z + b z' makes a step lead from z to z'."""
    determinant = here.p * here.beta - here.q * here.alpha
    across = here.p * there.q - here.q * there.p
    return -(there.p * here.beta - there.q * here.alpha) / across, determinant / across


def landings(levels: Sequence[Level]) -> Tensor:
    """Return `landing` of each of the K steps between K + 1 levels, (K, 2) float32."""
    pairs = itertools.pairwise(levels)
    return torch.tensor([landing(here, there) for here, there in pairs])
