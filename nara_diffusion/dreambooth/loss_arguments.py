"""The arguments of what is learnt, and of how much an error counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nara_diffusion.training.argument_checks import require
from nara_diffusion.training.cli import option

from .conversion import CONVERSIONS
from .distances import DISTANCES, Distance

_HUBER_C = 0.1


@dataclass
class LossArguments:
    """Objective"""

    prediction_type: str | None = option(
        None,
        "Teach the model to predict this in place of what it does: epsilon (the noise), v_prediction on the same "
        "schedule, or flow_prediction (the velocity of a rectified flow); none leaves it. The adapter's file carries "
        "the scheduler that then samples.",
        choices=CONVERSIONS,
    )
    rescale_betas_zero_snr: bool = option(
        False, "Teach it a schedule that ends in pure noise, so that it can make dark and bright images; needs v."
    )
    stratified_timesteps: bool = option(False, "Spread the timesteps of each optimizer step evenly over the schedule.")
    snr_gamma: float | None = option(None, "γ of min-SNR weights, 5 as a rule; none weights all timesteps alike.")
    noise_offset: float = option(0.0, "Standard deviation of a shift of each channel's noise, 0.1 at most as a rule.")
    do_edm_style_training: bool = option(
        False, "EDM's preconditioning and weights; models with an EDM scheduler have them in any case."
    )
    loss_type: str = option(
        "l2",
        "What an error e of each element counts: e² (l2), 2 c (√(e² + c²) − c) (huber) or 2 (√(e² + c²) − c) "
        "(smooth_l1), kohya's pseudo-Huber losses with c constant. Outside of a window the base is held by squares.",
        choices=DISTANCES,
    )
    huber_c: float | None = option(
        None,
        f"c of those: below it an error counts about as its square, above as its size; none means {_HUBER_C}.",
        unit="standard deviations of the noise",
    )


def distance_of(args: Any) -> Distance:
    """What `args`, a `LossArguments`, let an error count."""
    return Distance(args.loss_type, _HUBER_C if args.huber_c is None else args.huber_c)


def check_loss(args: Any) -> None:
    """Refuses values that no run can use.

    Raises:
        ValueError: naming the argument, its value and what it may be.
    """
    require(args, "snr_gamma", args.snr_gamma is None or args.snr_gamma > 0, "above 0, or none")
    require(args, "noise_offset", args.noise_offset >= 0, "at least 0")
    require(args, "loss_type", args.loss_type in DISTANCES, f"one of {', '.join(DISTANCES)}")
    c = args.huber_c
    require(args, "huber_c", c is None or 0 < c < math.inf, "above 0, or none")
    if c is not None and args.loss_type == "l2":
        raise ValueError(
            f"huber_c is {c}, but loss_type l2 has no c: give loss_type huber or smooth_l1, or leave huber_c out."
        )
