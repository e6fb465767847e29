"""The meaning of a small timestep that nobody has declared: t of a discrete schedule, or ¼ ln σ of an EDM one.

    discrete   t in [0, N], N = 1000: whole, or fractional with Karras' sigmas, and below 3.5 in the last steps alone
    EDM        t = ¼ ln σ: within ±3.5 throughout, and for σ from 80 to 1, the first steps, from 1.1 to 0

Confused with the other, the first steps of an EDM pipeline would run at λ = 0.001. So an ambiguous timestep counts as
discrete only if the running scheduler is a discrete one, or if it is a whole number and no scheduler is found. The
running scheduler is searched in the local variables of the calls around the denoiser's forward, the innermost first.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor

from nara_diffusion.noise.signals import as_tensor
from nara_diffusion.utils.call_stack import local_variables

LARGEST_LOG_SIGMA = math.log(1e6)
"""σ beyond 10⁶ is nobody's, but a timestep ¼ ln σ beyond 3.5 is a discrete schedule's."""

REPLACED = "_nara_replaced_scheduler"
"""The attribute of a pipeline with the scheduler that it had before an adapter's was set, which is not at work."""


def check_discrete(timestep: float | Tensor, argument: str) -> None:
    """Refuse a timestep of a discrete schedule that may be ¼ ln σ of an EDM one instead.

    Raises:
        ValueError: it may be, and the running scheduler is an EDM one or is not found.
    """
    t = as_tensor(timestep).detach()
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
    scheduler = _class("diffusers.schedulers.scheduling_utils", "SchedulerMixin")
    pipeline = _class("diffusers.pipelines.pipeline_utils", "DiffusionPipeline")
    for variables in local_variables():
        found: list[Any] = []
        for name, value in list(variables.items()):
            if issubclass(type(value), scheduler):
                found.append(value)
            elif name == "self" or issubclass(type(value), pipeline):
                parts = list(getattr(value, "__dict__", {}).items())
                found += [part for key, part in parts if key != REPLACED and issubclass(type(part), scheduler)]
        if found:
            return found
    return []


def _class(module: str, name: str) -> Any:
    """A class of Diffusers, for `issubclass`; of no object while Diffusers is not imported."""
    return getattr(sys.modules.get(module), name, ())
