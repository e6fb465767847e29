"""The UNet that a method trains: by the same configuration, from the same arguments, as the train scripts make."""

from __future__ import annotations

import copy
from typing import Any

from peft import inject_adapter_in_model

from nara_diffusion.training.adapters import NAMED, adapter_config, check_target_modules

BASE = "base"
"""The backbone as it is."""
NAMES = [BASE, *(name for name in NAMED if not name.endswith("_tuning")), "vera", "oft", "full"]
"""Of the methods that a UNet can have."""
NOISE_AWARE = ("nara", "nara_dora", "nara_knots")


def adapted(pipe: Any, method: str, args: Any) -> Any:
    """A copy of the UNet of `pipe`, in which what `method` trains requires a gradient, and nothing else.

    Raises:
        ValueError: a name in `target_modules` matches nothing, or a module that the method can't adapt.
    """
    unet = copy.deepcopy(pipe.unet)
    if method == BASE:
        return unet
    config = adapter_config(args, noise_convention="timestep")
    if config is None:
        return unet.requires_grad_(True)
    check_target_modules(unet, config.target_modules)
    return inject_adapter_in_model(config, unet)
