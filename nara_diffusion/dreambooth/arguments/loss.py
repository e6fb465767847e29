"""The arguments of what is learnt, and of how much an error counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nara_diffusion.dreambooth.conversion import CONVERSIONS
from nara_diffusion.training.arguments.checks import require
from nara_diffusion.training.arguments.cli import option


@dataclass
class LossArguments:
    """Objective"""

    prediction_type: str | None = option(
        None,
        "Teach the model to predict this in place of what it does: epsilon (the noise), v_prediction on the same "
        "schedule, or flow_prediction (the velocity of a rectified flow); none leaves it. The adapter's file carries "
        "the scheduler that then samples. Before training, the log says the loss of the base read by the identity.",
        choices=CONVERSIONS,
    )
    rescale_betas_zero_snr: bool = option(
        False, "Teach it a schedule that ends in pure noise, so that it can make dark and bright images; needs v."
    )
    stratified_timesteps: bool = option(False, "Spread the timesteps of each optimizer step evenly over the schedule.")
    snr_gamma: float | None = option(None, "γ of min-SNR weights, 5 as a rule; none weights all timesteps alike.")
    noise_offset: float = option(0.0, "Standard deviation of a shift of each channel's noise, 0.1 at most as a rule.")


def check_loss(args: Any) -> None:
    """Raises ValueError for values that no run can use."""
    require(args, "snr_gamma", args.snr_gamma is None or args.snr_gamma > 0, "above 0, or none")
    require(args, "noise_offset", args.noise_offset >= 0, "at least 0")
