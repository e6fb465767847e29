"""What an image run does: the arguments of train_scripts/dreambooth_sdxl.py, and the UNet that a method trains."""

from __future__ import annotations

import copy
from typing import Any

from peft import inject_adapter_in_model

from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.training.adapters import NAMED, adapter_config, check_target_modules
from quality.assets import ASSETS
from quality.images.held_out import BACKBONE, SIZE, SUBJECTS, check_subject, instance_prompt
from quality.options import arguments_of
from quality.running import RANK

# ---------------------------------------------------------------------- methods

BASE = "base"
"""The backbone as it is."""
NAMES = [BASE, *(name for name in NAMED if not name.endswith("_tuning")), "vera", "oft"]
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
    if method == "full":
        return unet.requires_grad_(True)
    config: Any = adapter_config(args, noise_convention="timestep")
    check_target_modules(unet, config.target_modules)
    return inject_adapter_in_model(config, unet)


# ---------------------------------------------------------------------- settings

DEFAULTS: dict[str, Any] = {
    "pretrained_model_name_or_path": str(ASSETS / BACKBONE),
    "resolution": SIZE[0],
    "rank": RANK,
    "train_batch_size": 5,
    "max_train_steps": 120,
    "learning_rate": 2e-3,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0.05,
    "stratified_timesteps": True,
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "num_validation_images": 3,
    "sample_batch_size": 16,
}


def arguments(subject: str, method: str, seed: int, overrides: dict[str, Any]) -> DreamBoothArguments:
    """Those of one run; overrides win over the defaults.

    Raises:
        ValueError: an unknown subject, an override that is no argument of the script, or whose value it refuses.
    """
    check_subject(subject)
    data = {"instance_data_dir": str(ASSETS / SUBJECTS[subject]), "instance_prompt": instance_prompt(subject)}
    adapter = {} if method in (BASE, "full") else {"adapter": method}
    values = DEFAULTS | data | overrides | adapter | {"seed": seed}
    return arguments_of(DreamBoothArguments, values)


def settings(overrides: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps beside what it names itself: all that isn't the script's own default."""
    named = ("pretrained_model_name_or_path", "rank", "max_train_steps", "learning_rate", "core_learning_rate")
    return {name: value for name, value in (DEFAULTS | overrides).items() if name not in named}
