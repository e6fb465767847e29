"""Adapters that convert the small SDXL to another prediction, in memory."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from nara_diffusion.loaders.schedulers import scheduler_fields
from tests.loaders.adapters import trained

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
SCHEDULERS = {
    "flow": (FLOW, "flow"),
    "v": (EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction"), "timestep"),
    "zero_snr": (
        EulerDiscreteScheduler(
            **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        "timestep",
    ),
}


def converted(kind: str, **changes: Any) -> Any:
    """A pipeline in memory with the adapter "default" and the scheduler that it was trained for."""
    scheduler, convention = SCHEDULERS[kind]
    pipe = trained(text=False, noise_convention=convention, scheduler=scheduler_fields(scheduler), **changes)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    return pipe
