"""The arguments of a window of noise levels, which both train scripts have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.noise.window import NoiseWindow
from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.adapters.methods import METHODS, method_of
from nara_diffusion.training.adapters.pissa import takes_start_from_base
from nara_diffusion.training.arguments.checks import require
from nara_diffusion.training.arguments.cli import option


@dataclass
class WindowArguments:
    """Window of noise levels (docs/windows.md)"""

    min_noise_level: float | None = option(
        None, "Train only where the noise level λ, 1 at pure noise, is at least this; none means 0.", unit="λ"
    )
    max_noise_level: float | None = option(
        None, "Train only where λ is below this; none means 1, which is included.", unit="λ"
    )
    hold_base_outside: float | None = option(
        None,
        "Weight W. Samples are drawn outside of the window too, and their loss is W times the distance of the model's "
        "prediction to the base model's: the mean square for images, KL(base, model) for text. None draws none there.",
    )
    hold_base_share: float | None = option(
        None,
        "Share of the samples that --hold_base_outside draws there; none means the share of all noise levels that lies "
        "outside of the window, so that λ is spread as without one.",
        unit="share of 1",
    )
    open_window: bool = option(
        False,
        "Leave the adapter on outside of the window. By default a NaRA's file holds the window as its strength, which "
        "is 0 outside; a LoRA's can't, and the run says how to give it the schedule. With --hold_base_outside the "
        "adapter is left on in any case.",
    )


def schedule_of(args: Any) -> StrengthSchedule | None:
    """The strength that the trained adapter is meant to have; None where it is on at every λ."""
    window = window_of(args)
    return None if args.open_window or window.hold_weight is not None else window.as_schedule()


def window_of(args: Any) -> NoiseWindow:
    """The window of noise levels that `args` (a `WindowArguments`) describe; by default all of [0, 1]."""
    return NoiseWindow(*_ends(args), args.hold_base_outside, args.hold_base_share)


def _ends(args: Any) -> tuple[float, float]:
    low, high = args.min_noise_level, args.max_noise_level
    return 0.0 if low is None else low, 1.0 if high is None else high


def check_window(args: Any) -> None:
    """Raises ValueError for a window without a λ, or holding the base where no λ lies outside of the window."""
    for name in ("min_noise_level", "max_noise_level"):
        value = getattr(args, name)
        require(
            args,
            name,
            value is None or 0 <= value <= 1,
            "in [0, 1] (λ, for which timestep 700 of 1000 is 0.7), or none",
        )
    low, high = _ends(args)
    if low >= high:
        raise ValueError(
            f"min_noise_level is {low} and max_noise_level {high}, so that no noise level lies between: "
            "min_noise_level has to be the smaller one."
        )
    weight, share = args.hold_base_outside, args.hold_base_share
    require(args, "hold_base_outside", weight is None or 0 < weight < math.inf, "above 0, or none")
    require(args, "hold_base_share", share is None or 0 < share < 1, "between 0 and 1, or none")
    if weight is not None:
        _check_hold(args, window_of(args))
    elif share is not None:
        raise ValueError(
            f"hold_base_share is {share}, but nothing is drawn outside of the window: give hold_base_outside, the "
            "weight of its loss, too."
        )
    if schedule_of(args) is not None:
        adapter_config(args, strength=schedule_of(args), total_steps=1_000_000)  # raises where it can't have one


def _check_hold(args: Any, window: NoiseWindow) -> None:
    if window.is_everything:
        raise ValueError(
            f"hold_base_outside is {args.hold_base_outside}, but no noise level lies outside of the window [0, 1]: "
            "give min_noise_level or max_noise_level."
        )
    method = method_of(args)
    config = adapter_config(args, total_steps=1_000_000)
    if config is None:
        reason = "trains all weights"
    elif takes_start_from_base(config):
        reason = "takes its start out of the base weights"
    elif getattr(config, "bias", "none") != "none":
        reason = f"trains biases of the base (bias={config.bias!r})"  # type: ignore[attr-defined]
    else:
        return
    able = ", ".join(name for name, other in METHODS.items() if other.family == "nara" or name in ("lora", "dora"))
    raise ValueError(
        f"hold_base_outside compares with the base model, which is the model with its adapter disabled, but "
        f"{method.title} {reason}, so that no base is left: leave hold_base_outside out, or choose one of {able} "
        "without that."
    )
