"""The UNet that a method trains: by the same configuration, from the same arguments, as the train scripts make."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, AdaLoraModel

from nara_diffusion.training.adapters.build import check_target_modules
from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.adapters.methods import METHODS

BASE = "base"
"""The backbone as it is."""
NAMES = [BASE, *(name for name, method in METHODS.items() if method.family != "prompt")]
"""Of the methods that a UNet can have."""
NOISE_AWARE = ("nara", "nara_dora", "nara_knots")


@dataclass(frozen=True)
class AdaptedUNet:
    """Attributes:
    unet: in which what the method trains requires a gradient, and nothing else.
    adalora: PEFT's tuners that allocate ranks during training, if it is AdaLoRA.
    """

    unet: Any
    adalora: list[AdaLoraModel] = field(default_factory=list)


def adapted(pipe: Any, method: str, args: Any) -> AdaptedUNet:
    """A copy of the UNet of `pipe`, for `method`.

    Raises:
        ValueError: a name in `target_modules` matches nothing, or a module that the method can't adapt.
    """
    unet = copy.deepcopy(pipe.unet)
    if method == BASE:
        return AdaptedUNet(unet)
    config = adapter_config(args, noise_convention="timestep", total_steps=args.max_train_steps)
    if config is None:
        return AdaptedUNet(unet.requires_grad_(True))
    check_target_modules(unet, config.target_modules)
    # what `inject_adapter_in_model` does, which refuses VeRA and doesn't return AdaLoRA's tuner
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](unet, config, adapter_name="default")
    return AdaptedUNet(unet, [tuner] if isinstance(tuner, AdaLoraModel) else [])
