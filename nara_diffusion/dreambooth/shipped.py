"""What dreambooth.py and dreambooth_sdxl.py do where no images or no model are named, and the defaults of families."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nara_diffusion.training.command import ASSETS, shipped

from .families import SD3
from .image_arguments import UNET_TARGETS
from .pipelines import family_of_model, native_resolution

logger = logging.getLogger(__name__)

STEPS = 500
"""Of a run on a named model: a pass over five images is two steps."""
# What a run does where no images are named, and where no model is.
SHIPPED_DATA: dict[str, Any] = {
    "instance_data_dir": str(ASSETS / "subject"),
    "instance_prompt": "a photo of sks toy",
    "validation_prompts": [
        "a photo of sks toy",
        "a photo of sks toy on the beach",
        "a photo of sks toy in the snow",
        "a photo of sks toy in the city",
    ],
    "identifier": ["sks"],
}
_TOY: dict[str, Any] = {
    "similarity_model": str(ASSETS / "clip-tiny"),
    "alignment_model": str(ASSETS / "clip-tiny"),
    "resolution": 64,
    "rank": 16,
    "train_batch_size": 5,
    "learning_rate": 2e-3,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "stratified_timesteps": True,
    "guidance_scale": 2.5,
    "sample_batch_size": 8,
}
SHIPPED_RUN: dict[str, Any] = {
    **_TOY,
    "pretrained_model_name_or_path": str(ASSETS / "sd-tiny-flow"),
    "max_sequence_length": 0,
    "weighting_scheme": "logit_normal",
    "target_modules": [*SD3.targets, "ff.net.0.proj", "ff.net.2"],
    "max_train_steps": 500,
    "num_inference_steps": 25,
    "validation_steps": 250,
    "checkpointing_steps": 250,
}
SHIPPED_SDXL: dict[str, Any] = {
    **_TOY,
    "pretrained_model_name_or_path": str(ASSETS / "sdxl-tiny"),
    "target_modules": [*UNET_TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"],
    "max_train_steps": 700,
    "num_inference_steps": 20,
    "validation_steps": 350,
    "checkpointing_steps": 350,
}


def shipped_run(given: Mapping[str, Any], values: Mapping[str, Any] = SHIPPED_RUN) -> dict[str, Any]:
    """The arguments of the shipped run, or what suits the family of the model that was `given`."""
    if "pretrained_model_name_or_path" in given:
        return family_defaults(given)
    if "instance_data_dir" in given:
        logger.info(
            "no model was named: your images teach %s, a toy of %d pixels; for SDXL at 1024 add "
            "--config train_scripts/configs/sdxl_dreambooth.yaml, or with settings of your own "
            "--pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0",
            values["pretrained_model_name_or_path"],
            values["resolution"],
        )
        return shipped(values)
    return shipped({**values, **SHIPPED_DATA})


def family_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that suit the model that was `given` and its family, in place of the script's own defaults."""
    name, hub = given["pretrained_model_name_or_path"], {"revision": given.get("model_options", {}).get("revision")}
    if not name:
        return {}  # which the arguments refuse
    family = family_of_model(name, **hub)
    defaults = {"target_modules": list(family.targets), **family.defaults}
    if "num_train_epochs" not in given:
        defaults["max_train_steps"] = STEPS
    if (resolution := native_resolution(name, family, **hub)) is not None:
        defaults["resolution"] = resolution
    return defaults
