"""The arguments of the average of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nara_diffusion.training.arguments.checks import require
from nara_diffusion.training.arguments.cli import option

_DECAY = 0.9999


@dataclass
class AverageArguments:
    """Average of the weights (docs/dreambooth.md)"""

    use_ema: bool = option(
        False, "Save, sample and measure an exponential moving average of what is trained in place of its last step."
    )
    ema_decay: float | None = option(
        None,
        f"Most that a step n leaves of the average, which is at most n / (n + 9) too; none means {_DECAY}.",
        unit="share of 1",
    )


def decay_of(args: Any) -> float:
    """Return the share of the average that a step keeps, by `args`, an `AverageArguments`."""
    return _DECAY if args.ema_decay is None else args.ema_decay


def check_average(args: Any) -> None:
    """Raises ValueError for values that no run can use."""
    require(args, "ema_decay", args.ema_decay is None or 0 <= args.ema_decay < 1, "in [0, 1), or none")
    if args.ema_decay is not None and not args.use_ema:
        raise ValueError(f"ema_decay is {args.ema_decay}, but nothing is averaged: add use_ema, or leave it out.")
    if args.use_ema and args.adapter == "adalora":
        raise ValueError(
            "use_ema averages weights of many steps, and adapter adalora drops directions of the last one, which the "
            "average would still have: leave use_ema out, or choose another adapter."
        )
