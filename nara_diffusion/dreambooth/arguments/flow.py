"""The arguments of rectified flows: which noise levels are drawn, and what they count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nara_diffusion.training.arguments.checks import refuse_unread, require
from nara_diffusion.training.arguments.cli import option

WEIGHTING = ("cosmap", "sigma_sqrt")
SCHEMES = ("none", "logit_normal", "mode", *WEIGHTING)
LARGEST_MODE_SCALE = 2 / (math.pi - 2)
"""k beyond which, and below −1, u would not fall as v grows."""
_READERS = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}


@dataclass
class FlowArguments:
    """Noise levels of rectified flows (docs/dreambooth.md)"""

    weighting_scheme: str = option(
        "none",
        "Draw middle noise levels more often (logit_normal, mode) or weight their errors (cosmap, sigma_sqrt).",
        choices=SCHEMES,
    )
    logit_mean: float | None = option(
        None, "Mean of logit_normal; above 0 means less noise, as in Diffusers' scripts; none means 0."
    )
    logit_std: float | None = option(None, "Standard deviation of logit_normal; none means 1.")
    mode_scale: float | None = option(None, "Scale of mode; none means 1.29.")
    flow_shift: float | None = option(
        None, "s of σ → s σ / (1 + (s − 1) σ); none means what the scheduler says, 1 where it depends on the size."
    )


def check_flow(args: Any) -> None:
    """Raises ValueError for values that no run can use."""
    for name, scheme in _READERS.items():
        refuse_unread(args, name, "weighting_scheme", [scheme])
    if args.snr_gamma is not None and args.weighting_scheme in WEIGHTING:
        raise ValueError(
            f"weighting_scheme {args.weighting_scheme!r} weights the errors, and so does snr_gamma: leave one out."
        )
    mean, std, scale, shift = args.logit_mean, args.logit_std, args.mode_scale, args.flow_shift
    require(args, "weighting_scheme", args.weighting_scheme in SCHEMES, f"one of {', '.join(SCHEMES)}")
    require(args, "logit_mean", mean is None or math.isfinite(mean), "a number, or none")
    require(args, "logit_std", std is None or 0 < std < math.inf, "above 0, or none")
    bound = f"between -1 and {LARGEST_MODE_SCALE:.3f}, or none"
    require(args, "mode_scale", scale is None or -1 <= scale <= LARGEST_MODE_SCALE, bound)
    require(args, "flow_shift", shift is None or 0 < shift < math.inf, "above 0, or none")
