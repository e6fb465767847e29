"""Default settings of a run: those of the shipped run, or of the model that the user names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from nara_diffusion.training.arguments import CONFIGS, shipped_settings

from .families import Family
from .pipelines import family_of_model

logger = logging.getLogger(__name__)

STEPS = 500
"""The default number of optimizer steps if the user names a model. A pass over five images has
only two steps."""


def shipped_run(
    given: Mapping[str, Any], config: Path = CONFIGS / "sd_tiny_flow.yaml"
) -> dict[str, Any]:
    """Return the arguments of the shipped run, or the defaults of the `given` model if any."""
    if "pretrained_model_name_or_path" in given:
        return family_defaults(given)
    source = "dataset_config" if "dataset_config" in given else "instance_data_dir"
    data = (source, "instance_data_dir", "instance_prompt", "validation_prompts", "identifier")
    data += ("validation_steps",)  # the shipped run validates only at its end
    sdxl = "sdxl_dreambooth"
    if "distill_to" in given:
        config = config.with_name(f"{config.stem}_4_steps.yaml")
        source = "instance_prompt" if "instance_prompt" in given else "prompts_file"
        data = (source, "prompts_file", "validation_prompts")
        sdxl = "sdxl_4_steps"
    return shipped_settings(
        config,
        given,
        data,
        toy="a toy of 64 pixels",
        shown="max_train_steps learning_rate rank num_inference_steps guidance_scale",
        advice=f"SDXL at 1024 add --config train_scripts/configs/{sdxl}.yaml, "
        "or with settings of your own "
        "--pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0",
    )


def family_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults for the `given` model and its family, instead of the script's own."""
    name = given["pretrained_model_name_or_path"]
    if not name:
        return {}  # the arguments raise for it
    revision = given.get("revision")
    family = family_of_model(name, revision=revision)
    defaults = {"target_modules": list(family.targets), **family.defaults, "max_train_steps": STEPS}
    if "distill_to" in given:
        defaults |= {"adapter": "dora"}
        defaults.pop("weighting_scheme", None)
    native = native_resolution(name, family, revision=revision)
    if native is None:
        return defaults
    if given.get("resolution", native) > 2 * native:
        logger.warning(
            "%s was made for images of %d pixels, but --resolution is %d: its samples may be broken.",
            *(name, native, given["resolution"]),
        )
    return {**defaults, "resolution": native}


def native_resolution(name: str, family: Family, *, revision: str | None = None) -> int | None:
    """Return the native side of a model's images in pixels; None if the configuration lacks it."""
    read: Callable[..., Any] = AutoencoderKL.load_config  # loads any model's configuration
    try:
        side = read(name, subfolder=family.denoiser, revision=revision).get("sample_size")
        blocks = read(name, subfolder="vae", revision=revision).get("block_out_channels")
    except OSError:
        return None
    return side * 2 ** (len(blocks) - 1) if isinstance(side, int) and blocks else None
