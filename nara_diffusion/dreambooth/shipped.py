"""What dreambooth.py and dreambooth_sdxl.py do where no images or no model are named, and the defaults of families."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nara_diffusion.training.command import ASSETS, own_settings, shipped

from .pipelines import family_of_model, native_resolution

logger = logging.getLogger(__name__)

CONFIGS = ASSETS.parents[1] / "train_scripts" / "configs"
STEPS = 500
"""Of a run on a named model: a pass over five images is two steps."""
_TOLD = "max_train_steps learning_rate rank num_inference_steps guidance_scale"
_DATA = ("instance_data_dir", "instance_prompt", "validation_prompts", "identifier")


def shipped_run(given: Mapping[str, Any], config: Path = CONFIGS / "sd_tiny_flow.yaml") -> dict[str, Any]:
    """The arguments of the shipped run, which `config` holds, or what suits the model that was `given`."""
    if "pretrained_model_name_or_path" in given:
        return family_defaults(given)
    if not config.is_file():
        return shipped({"pretrained_model_name_or_path": config})  # which refuses it
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    places = {name: value for name, value in values.items() if str(value).startswith("examples/")}
    values |= {name: str(ASSETS.parents[1] / value) for name, value in places.items()}
    if "instance_data_dir" in given:
        logger.info(
            "no model was named: your images teach %s, a toy of %d pixels, with its own settings (%s); for SDXL at "
            "1024 add --config train_scripts/configs/sdxl_dreambooth.yaml, or with settings of your own "
            "--pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0",
            values["pretrained_model_name_or_path"],
            values["resolution"],
            own_settings(values, given, _TOLD),
        )
        values = {name: value for name, value in values.items() if name not in _DATA}
    return shipped(values)


def family_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that suit the model that was `given` and its family, in place of the script's own defaults."""
    name, hub = given["pretrained_model_name_or_path"], {"revision": given.get("model_options", {}).get("revision")}
    if not name:
        return {}  # which the arguments refuse
    family = family_of_model(name, **hub)
    defaults = {"target_modules": list(family.targets), **family.defaults, "max_train_steps": STEPS}
    if (resolution := native_resolution(name, family, **hub)) is not None:
        defaults["resolution"] = resolution
        if given.get("resolution", resolution) > 2 * resolution:
            logger.warning("%s was made for %d pixels, and resolution is %d", name, resolution, given["resolution"])
    return defaults
