"""What a converted model learns to say: the objectives of the regime "conversion".

    eps_to_v      v = √ᾱ ε − √(1 − ᾱ) x           on the schedule that the base has
    eps_to_flow   u = ε − x                       on x_σ = (1 − σ) x + σ ε, timestep 1000 σ: a rectified flow
    zero_snr      v                               on that schedule rescaled so that ᾱ of the last timestep is 0
    eps           ε                               what the base was trained for

The denoiser's argument stays a timestep of [0, 1000], so that λ = timestep / 1000 in each of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from nara_diffusion import TimestepNoise
from nara_diffusion.dreambooth.objectives import Objective, build_objective

CONVERSIONS = ("eps_to_v", "eps_to_flow", "zero_snr")
LEVELS = 1000

_CHANGES: dict[str, dict[str, Any]] = {
    "eps": {},
    "eps_to_v": {"prediction_type": "v_prediction"},
    "zero_snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


def build_conversion(name: str, scheduler: Any) -> Objective:
    """The objective `name` for a base whose pipeline has `scheduler`.

    Raises:
        ValueError: there is no such objective.
    """
    if name == "eps_to_flow":
        flow = build_objective(FlowMatchEulerDiscreteScheduler())
        # σ = (i + 1) / N; λ is read from the timestep as of a discrete schedule
        return replace(flow, source=TimestepNoise("discrete"), timestep=torch.arange(1, LEVELS + 1))
    if name not in _CHANGES:
        raise ValueError(f"objective is {name!r}, expected one of {', '.join(('eps', *CONVERSIONS))}.")
    return build_objective(DDPMScheduler.from_config(scheduler.config, **_CHANGES[name]))
