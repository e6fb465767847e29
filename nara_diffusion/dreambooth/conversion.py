"""Conversion: a base taught to predict something else, the scheduler that then samples, and what it can do untrained.

    what is asked for            the converted model's scheduler
    epsilon, v_prediction        the base's class and betas, with that prediction
    rescale_betas_zero_snr       the same with betas rescaled so that ᾱ_N = 0, and trailing timesteps, which begin at
                                 pure noise (arXiv 2305.08891); for v and x
    flow_prediction              DPM-Solver++ over the σ of a rectified flow, which hands 1000 σ to the UNet
                                 (FlowMatchEulerDiscreteScheduler lacks scale_model_input and init_noise_sigma, which
                                 SDXL's pipeline calls for)

The objective, λ's definition and what the adapter's file says follow from that scheduler.

The identity: ε, v, x and flow are one prediction read four ways, so that a base needs no training to give another. At
noise level i the objective shows x_i = p x + q ε and wants α x + β ε. With φ = atan(q / p), whose SNR is cot² φ, the
base is shown z = x_i / √(p² + q²) = cos φ x + sin φ ε at its own timestep of the nearest φ, and says a x̂ + b ε̂, where
(a, b) is (0, 1) for ε, (−sin φ, cos φ) for v and (1, 0) for x. These two equations give x̂ and ε̂, and the reading:

    α x̂ + β ε̂ = ((α b − β a) z + (β cos φ − α sin φ) (a x̂ + b ε̂)) / (b cos φ − a sin φ)

A φ outside of the base's schedule is clamped to its end, and that is all that the identity leaves to train: at zero
terminal SNR the last steps, where ᾱ falls below the base's smallest, of a flow the first too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from nara_diffusion.noise.denoisers import passes_log_sigma
from nara_diffusion.noise.prediction import FLOW, ZERO_SNR, Prediction, prediction_by

from .objectives import Objective, build_objective, rows

CONVERSIONS = ("epsilon", "v_prediction", FLOW)


def converted_scheduler(scheduler: Any, prediction_type: str | None, rescale_betas_zero_snr: bool) -> Any:
    """The scheduler of the converted model; the base's `scheduler` itself where it does all that is asked for.

    Args:
        prediction_type: what is to be predicted; None what the base predicts.
        rescale_betas_zero_snr: on a schedule that ends in pure noise.

    Raises:
        ValueError: a base that can't be converted so.
    """
    own = prediction_by(scheduler) or Prediction("epsilon", "unknown")
    kind, has_zero_snr = prediction_type or own.kind, own.path == ZERO_SNR
    if own.path != "unknown" and own.kind == kind and (has_zero_snr or not rescale_betas_zero_snr):
        return scheduler
    has_betas = "beta_schedule" in scheduler.config and own.path not in ("rectified flow", "unknown")
    if passes_log_sigma(scheduler) or not has_betas:
        raise ValueError(
            f"{type(scheduler).__name__} has no betas to convert the model to: leave prediction_type and "
            "rescale_betas_zero_snr out, or give the base model's folder a scheduler with betas."
        )
    zero_snr = rescale_betas_zero_snr or (has_zero_snr and kind != FLOW)
    if zero_snr and kind in ("epsilon", FLOW):
        raise ValueError(
            f"rescale_betas_zero_snr is for a model that predicts v, not {kind!r}: at zero terminal SNR the last step "
            "shows pure noise, of which ε says nothing about the image, and a rectified flow ends so as it is. Add "
            "--prediction_type v_prediction."
        )
    if kind == FLOW:
        return DPMSolverMultistepScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps, prediction_type=FLOW, use_flow_sigmas=True
        )
    changes: dict[str, Any] = {"prediction_type": kind}
    if zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    # where the base's class lacks one of the options, Euler's has them all
    has_options = changes.keys() <= inspect.signature(type(scheduler)).parameters.keys()
    kept: Any = type(scheduler) if has_options else EulerDiscreteScheduler
    return kept.from_config(scheduler.config, **changes)


class IdentityReading:
    """What a base model predicts, read as the prediction that an objective asks for.

        prediction = reading.prediction(x, base(*reading.base_inputs(x, indices)), indices)

    Args:
        base_scheduler: of the base; it has betas and predicts ε, v or x.
        objective: of the converted model.

    Attributes:
        timesteps: t (N,) int64, by the objective's index.
        angles: φ (N,) float64, clamped.
        clamped: (N,) bool, where φ lies outside of the base's schedule.

    Raises:
        ValueError: a base of another kind.
    """

    def __init__(self, base_scheduler: Any, objective: Objective) -> None:
        base = build_objective(base_scheduler)
        self.kind, self.objective = base.prediction_type, objective
        angles = torch.atan2(base.q, base.p)  # (N,)
        if self.kind == "epsilon":
            angles = angles[base.p > 0]
        wanted = torch.atan2(objective.q, objective.p)
        self.angles = wanted.clamp(angles[0], angles[-1])
        self.timesteps = (self.angles[:, None] - angles).abs().argmin(1)
        self.clamped = (wanted - self.angles).abs() > 1e-6
        self._scale = torch.hypot(objective.p, objective.q).reciprocal()

    def base_inputs(self, model_input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """z (b, c, h, w) and t (b,), which the base takes, of x_i (b, c, h, w) and its indices (b,)."""
        timestep = self.timesteps[indices.cpu()].to(model_input.device)
        return rows(self._scale, indices, model_input) * model_input, timestep

    def prediction(self, model_input: Tensor, base_prediction: Tensor, indices: Tensor) -> Tensor:
        """α x̂ + β ε̂ (b, c, h, w) float32, differentiable in `base_prediction`, what the base says of `base_inputs`."""
        z, said = self.base_inputs(model_input, indices)[0].float(), base_prediction.float()
        values = (self.angles.cos(), self.angles.sin(), self.objective.alpha, self.objective.beta)
        cos, sin, alpha, beta = (rows(each, indices, model_input) for each in values)
        a, b = {"epsilon": (0.0, 1.0), "v_prediction": (-sin, cos), "sample": (1.0, 0.0)}[self.kind]
        return ((alpha * b - beta * a) * z + (beta * cos - alpha * sin) * said) / (b * cos - a * sin)
