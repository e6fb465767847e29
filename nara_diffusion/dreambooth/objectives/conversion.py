"""Conversion teaches a model to predict something else; this builds the scheduler of the converted model.

    what is asked for            the converted model's scheduler
    epsilon, v_prediction        the base's class and betas, with that prediction
    rescale_betas_zero_snr       the same with betas rescaled so that ᾱ_N = 0, and trailing timesteps, which begin at
                                 pure noise (arXiv 2305.08891); for v and x
    flow_prediction              DPM-Solver++ over the σ of a rectified flow, which hands 1000 σ to the UNet
                                 (FlowMatchEulerDiscreteScheduler lacks scale_model_input and init_noise_sigma, which
                                 SDXL's pipeline calls for)

All else follows from that scheduler: the objective, λ's definition, how samples are made, and what the adapter's file
says of it.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from nara_diffusion.noise.schedulers.prediction import FLOW, ZERO_SNR, prediction_by
from nara_diffusion.noise.schedulers.timestep_meaning import passes_log_sigma

CONVERSIONS = ("epsilon", "v_prediction", FLOW)
_EPSILON_AT_ZERO = (
    "at zero terminal SNR the last step shows the model pure noise, of which ε says nothing about the image: add "
    "--prediction_type v_prediction"
)


def check_conversion(prediction_type: str | None, rescale_betas_zero_snr: bool, edm_style: bool) -> None:
    """Raises ValueError for what makes no sense, whatever the base."""
    if prediction_type not in (None, *CONVERSIONS):
        raise ValueError(f"prediction_type is {prediction_type!r}, expected one of {', '.join(CONVERSIONS)}, or none.")
    if prediction_type == FLOW and rescale_betas_zero_snr:
        raise ValueError(
            "rescale_betas_zero_snr is for schedules of betas, and a rectified flow ends in pure noise as it is: leave "
            f"it out with prediction_type {FLOW!r}."
        )
    if edm_style and (prediction_type == FLOW or rescale_betas_zero_snr):
        what = f"prediction_type {FLOW!r}" if prediction_type == FLOW else "rescale_betas_zero_snr"
        raise ValueError(f"do_edm_style_training has no terms for {what}: leave one of them out.")
    if rescale_betas_zero_snr and prediction_type == "epsilon":
        raise ValueError(f"rescale_betas_zero_snr with prediction_type 'epsilon': {_EPSILON_AT_ZERO}.")


def converted_scheduler(scheduler: Any, prediction_type: str | None, rescale_betas_zero_snr: bool) -> Any:
    """The scheduler of the converted model; `scheduler` itself where it does all that is asked for.

    Args:
        scheduler: the base's.
        prediction_type: what is to be predicted; None what the base predicts.
        rescale_betas_zero_snr: on a schedule that ends in pure noise.

    Raises:
        ValueError: a base that can't be converted so.
    """
    own = prediction_by(scheduler)
    kind = (own.kind if own else "epsilon") if prediction_type is None else prediction_type
    zero_snr = own is not None and own.path == ZERO_SNR
    if own is not None and own.kind == kind and (zero_snr or not rescale_betas_zero_snr):
        return scheduler
    _check_base(scheduler)
    if kind == FLOW:
        return DPMSolverMultistepScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps, prediction_type=FLOW, use_flow_sigmas=True
        )
    changes: dict[str, Any] = {"prediction_type": kind}
    if rescale_betas_zero_snr or zero_snr:
        if kind == "epsilon":
            raise ValueError(
                f"The converted model would have rescale_betas_zero_snr and predict ε: {_EPSILON_AT_ZERO}."
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return _class_with(scheduler, changes).from_config(scheduler.config, **changes)


def _check_base(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if passes_log_sigma(scheduler):
        raise ValueError(
            f"{name} is an EDM scheduler, whose models are conditioned on ¼ ln σ: they can't be converted, leave "
            "prediction_type and rescale_betas_zero_snr out."
        )
    if "beta_schedule" not in scheduler.config or prediction_by(scheduler).path == "rectified flow":  # type: ignore[union-attr]
        raise ValueError(
            f"{name} has no betas to convert the model to: leave prediction_type and rescale_betas_zero_snr out, or "
            "give the base model's folder a scheduler with betas."
        )


def _class_with(scheduler: Any, options: dict[str, Any]) -> Any:
    """Its class, or, where that lacks one of the options, Euler's method, which has them all."""
    known = inspect.signature(type(scheduler)).parameters
    return type(scheduler) if options.keys() <= known.keys() else EulerDiscreteScheduler
