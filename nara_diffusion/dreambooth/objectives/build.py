"""The objective that belongs to a pipeline's scheduler."""

from __future__ import annotations

from typing import Any

from nara_diffusion.noise.schedulers.prediction import FLOW, prediction_by

from .density import UNIFORM, TimestepDensity
from .discrete import DiscreteObjective
from .flow import FlowObjective
from .preconditioned import PreconditionedObjective, is_continuous, is_edm
from .terms import Objective


def build_objective(
    scheduler: Any,
    *,
    edm_style: bool = False,
    snr_gamma: float | None = None,
    shift: float | None = None,
    density: TimestepDensity = UNIFORM,
) -> Objective:
    """The objective for a pipeline with this scheduler.

    Args:
        scheduler: `pipe.scheduler`.
        edm_style: EDM's terms; an EDM scheduler needs them and has them in any case.
        snr_gamma: γ of min-SNR weights, or None.
        shift: of a rectified flow's σ; None takes what the scheduler says, 1 where it depends on the image's size.
        density: whose weights the errors of a rectified flow have.

    Raises:
        ValueError: an unknown prediction type, a schedule without ᾱ, min-SNR in EDM's terms, or EDM's terms of a flow.
    """
    prediction = prediction_by(scheduler)
    if prediction is not None and prediction.kind == FLOW:
        if edm_style:
            raise ValueError("a rectified flow has no EDM terms: leave do_edm_style_training out.")
        shift = scheduler_shift(scheduler) if shift is None else shift
        return FlowObjective(snr_gamma, scheduler.config.num_train_timesteps, shift, density)
    if not (edm_style or is_edm(scheduler) or is_continuous(scheduler)):
        return DiscreteObjective(scheduler, snr_gamma)
    if snr_gamma is not None:
        raise ValueError(
            f"snr_gamma is {snr_gamma}, but EDM-style training has weights of its own: leave snr_gamma out, or "
            f"{'use another model' if is_edm(scheduler) else 'train without do_edm_style_training'}."
        )
    return PreconditionedObjective(scheduler)


def scheduler_shift(scheduler: Any) -> float:
    """s by which the scheduler of a rectified flow shifts its σ at any size of image."""
    if scheduler.config.get("use_dynamic_shifting"):
        return 1.0
    return float(scheduler.config.get("shift", scheduler.config.get("flow_shift")) or 1.0)
