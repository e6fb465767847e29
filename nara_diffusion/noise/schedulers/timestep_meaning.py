"""The meaning of a small timestep that nobody has declared: t of a discrete schedule, or ¼ ln σ of an EDM one.

    discrete   t in [0, N], N = 1000: whole, or fractional with Karras' sigmas, and below 3.5 in the last steps alone
    EDM        t = ¼ ln σ: within ±3.5 throughout, and for σ from 80 to 1, the first steps, from 1.1 to 0

Confused with the other, the first steps of an EDM pipeline would run at λ = 0.001. So an ambiguous timestep counts as
discrete only if the running scheduler is a discrete one, or if it is a whole number and no scheduler is found. The
running scheduler is searched in the local variables of the calls around the denoiser's forward, the innermost first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.utils.call_stack import local_variables

LARGEST_LOG_SIGMA = math.log(1e6)
"""σ beyond 10⁶ is nobody's, but a timestep ¼ ln σ beyond 3.5 is a discrete schedule's."""


def check_discrete(timestep: float | Tensor, argument: str) -> None:
    """Refuse a timestep of a discrete schedule that may be ¼ ln σ of an EDM one instead.

    Raises:
        ValueError: it may be, and the running scheduler is an EDM one or is not found.
    """
    t = torch.as_tensor(timestep).detach()
    if not t.is_floating_point() or bool((4 * t.float().abs() >= LARGEST_LOG_SIGMA).any()):
        return
    schedulers = schedulers_at_work()
    continuous = [type(scheduler).__name__ for scheduler in schedulers if passes_log_sigma(scheduler)]
    if not continuous and (schedulers or bool((t == t.round()).all())):
        return
    who = (
        f"{continuous[0]} passes ¼ ln σ"
        if continuous
        else "it may be ¼ ln σ of an EDM schedule, and none is to be seen"
    )
    raise ValueError(
        f"{argument} is {t.tolist()}, which as 'discrete' would be almost no noise, but {who}: say what this pipeline "
        'means by it, once, set_noise_source(model, TimestepNoise("edm")) or TimestepNoise("discrete").'
    )


def passes_log_sigma(scheduler: Any) -> bool:
    """Whether a scheduler of Diffusers hands ¼ ln σ to the denoiser."""
    config = scheduler.config
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return type(scheduler).__name__.startswith("EDM") or continuous


def schedulers_at_work() -> list[Any]:
    """The schedulers of the innermost call that has any: as a variable, of a pipeline, or of its `self`."""
    for variables in local_variables():
        known = [scheduler for name, value in variables.items() for scheduler in _schedulers_of(name, value)]
        if known:
            return known
    return []


def _schedulers_of(name: str, value: Any) -> list[Any]:
    if _is_a("SchedulerMixin", value):
        return [value]
    if name == "self" or _is_a("DiffusionPipeline", value):
        return [part for part in getattr(value, "__dict__", {}).values() if _is_a("SchedulerMixin", part)]
    return []


def _is_a(class_name: str, value: Any) -> bool:
    """Whether an object has a class of that name, so that Diffusers need not be imported."""
    return any(kind.__name__ == class_name for kind in type(value).__mro__)
