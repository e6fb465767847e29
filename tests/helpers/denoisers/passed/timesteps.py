"""How a pipeline passes a timestep to its denoiser: lines of its source, and the scheduler that it has."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True)
class Passed:
    """Assignments of a pipeline's source, and the argument (`name=value` or `value`) in its call of the denoiser."""

    path: str
    lines: tuple[str, ...]
    argument: str
    scheduler: Any


N_SIGMA = functools.partial(FlowMatchEulerDiscreteScheduler, shift=3.0)
SIGMA = functools.partial(FlowMatchEulerDiscreteScheduler, shift=3.0, num_train_timesteps=1)
DATA = functools.partial(SIGMA, invert_sigmas=True)
FROM_ONE = functools.partial(DDIMScheduler, steps_offset=1)
DISCRETE = functools.partial(DDIMScheduler, num_train_timesteps=1000)
LOG_SIGMA = functools.partial(
    EulerDiscreteScheduler,
    timestep_type="continuous",
    prediction_type="v_prediction",
    use_karras_sigmas=True,
    sigma_min=0.002,
    sigma_max=700.0,
)

EXPAND = "timestep = t.expand(latents.shape[0])"
EXPAND_INPUT = "timestep = t.expand(latent_model_input.shape[0])"
CAST = "timestep = t.expand(latents.shape[0]).to(latents.dtype)"
CAST_INPUT = "timestep = t.expand(latent_model_input.shape[0]).to(latent_model_input.dtype)"


class AtanScheduler:
    """The timesteps of CosineDPMSolverMultistepScheduler, which needs the package torchsde, by its formula."""

    config = SimpleNamespace()

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.sigmas = torch.linspace(math.log(500), math.log(0.3), num_inference_steps).exp()
        self.timesteps = self.sigmas.atan() / math.pi * 2


def passed(path: str, *lines: str, scheduler: Any = N_SIGMA) -> Passed:
    """`path` is folder/module in diffusers.pipelines, or, after "modular ", in diffusers.modular_pipelines."""
    return Passed(path, lines[:-1], lines[-1], scheduler)
