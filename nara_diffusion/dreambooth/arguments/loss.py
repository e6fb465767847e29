"""The arguments of what is learnt, and of how much an error counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nara_diffusion.dreambooth.objectives.conversion import CONVERSIONS
from nara_diffusion.dreambooth.objectives.distances import DISTANCES, Distance
from nara_diffusion.dreambooth.objectives.timestep_bias import STRATEGIES, TimestepBias
from nara_diffusion.training.arguments.checks import refuse_unread, require
from nara_diffusion.training.arguments.cli import option

_HUBER_C = 0.1
_PORTION = 0.25


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
    timestep_bias_strategy: str = option(
        "none",
        "Draw timesteps of little noise (earlier), of much noise (later) or of a range more often than the others.",
        choices=STRATEGIES,
    )
    timestep_bias_multiplier: float = option(1.0, "How many times as often; below 1 less often.", unit="times")
    timestep_bias_portion: float | None = option(
        None, f"Share of the timesteps that earlier and later mean; none means {_PORTION}.", unit="share of 1"
    )
    timestep_bias_begin: int | None = option(
        None, "First timestep of the range, 0 at least noise; none means 0.", unit="timesteps"
    )
    timestep_bias_end: int | None = option(
        None, "Timestep before which the range ends; none means all of the schedule, 1000.", unit="timesteps"
    )


def bias_of(args: Any) -> TimestepBias:
    """Return which timesteps are drawn more often, by `args`, a `LossArguments`."""
    portion = _PORTION if args.timestep_bias_portion is None else args.timestep_bias_portion
    strategy, multiplier = args.timestep_bias_strategy, args.timestep_bias_multiplier
    return TimestepBias(strategy, multiplier, portion, args.timestep_bias_begin or 0, args.timestep_bias_end)


def distance_of(args: Any) -> Distance:
    """Return the distance that measures an error, by `args`, a `LossArguments`."""
    return Distance(args.loss_type, _HUBER_C if args.huber_c is None else args.huber_c)


def check_loss(args: Any) -> None:
    """Raises ValueError for values that no run can use."""
    require(args, "snr_gamma", args.snr_gamma is None or args.snr_gamma > 0, "above 0, or none")
    require(args, "noise_offset", args.noise_offset >= 0, "at least 0")
    require(args, "loss_type", args.loss_type in DISTANCES, f"one of {', '.join(DISTANCES)}")
    c = args.huber_c
    require(args, "huber_c", c is None or 0 < c < math.inf, "above 0, or none")
    if c is not None and args.loss_type == "l2":
        raise ValueError(
            f"huber_c is {c}, but loss_type l2 has no c: give loss_type huber or smooth_l1, or leave huber_c out."
        )
    _check_bias(args)


def _check_bias(args: Any) -> None:
    strategy, multiplier, portion = (getattr(args, f"timestep_bias_{n}") for n in ("strategy", "multiplier", "portion"))
    require(args, "timestep_bias_strategy", strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}")
    require(args, "timestep_bias_multiplier", 0 < multiplier < math.inf, "above 0 (--max_noise_level leaves λ out)")
    require(args, "timestep_bias_portion", portion is None or 0 < portion < 1, "between 0 and 1, or none")
    for name in ("timestep_bias_begin", "timestep_bias_end"):
        require(args, name, getattr(args, name) is None or getattr(args, name) >= 0, "at least 0, or none")
    readers = {"multiplier": ("earlier", "later", "range"), "portion": ("earlier", "later")}
    readers |= {"begin": ("range",), "end": ("range",)}
    for name, strategies in readers.items():
        unset = 1.0 if name == "multiplier" else None
        refuse_unread(args, f"timestep_bias_{name}", "timestep_bias_strategy", strategies, unset)
    if strategy != "none" and multiplier == 1:
        raise ValueError(
            f"timestep_bias_strategy is {strategy}, but timestep_bias_multiplier is 1, by which nothing changes: give "
            "2, for twice as often, or another."
        )
