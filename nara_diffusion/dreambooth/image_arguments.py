"""The arguments of dreambooth/train.py: defaults, checks, and the family that they select.

The defaults are those of the shipped run, or of the model that the user names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from nara_diffusion.training.adapters import check_adapter
from nara_diffusion.training.arguments import CONFIGS, check_arguments, method_of, shipped_settings
from nara_flags.hints import OTHERS
from nara_flags.images import ImageFlags
from nara_flags.options import converted, kinds_of
from nara_flags.parser import hint, read_yaml

from .captions import check_prompt, put_trigger
from .families import HIGH, LOW, Family
from .pipelines import family_of, family_of_model


@dataclass
class DreamBoothArguments(ImageFlags):
    """The flags, after the checks that need libraries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arguments(self)
        check_adapter(self)
        reasons = {
            "prompt": "puts virtual tokens before a language model's text",
            "full": "trains all weights, which Diffusers' own scripts do",
        }
        method = method_of(self).family
        if method in reasons:
            raise ValueError(
                f"--adapter {self.adapter} {reasons[method]}. Choose another adapter for images."
            )
        if self.trigger is not None:
            check_prompt(self.trigger, "trigger")
        for name in ("instance_prompt", "class_prompt"):
            if getattr(self, name) is not None:
                prompt = check_prompt(getattr(self, name), name)
                setattr(self, name, put_trigger(prompt, self.trigger))
        if self.validation_prompts is not None:
            prompts = [
                check_prompt(text, "a validation prompt") for text in self.validation_prompts
            ]
            self.validation_prompts = [put_trigger(prompt, self.trigger) for prompt in prompts]


FOLDER_KEYS = (
    "instance_data_dir", "source_data_dir", "instance_prompt", "trigger", "caption_column", "repeats",
    "resolution", "aspect_ratio_buckets", "class_data_dir", "class_prompt", "num_class_images",
    "alpha_mask",
)  # fmt: skip
"""The flags that a folder of `--dataset_config` may set for itself."""


def folder_arguments(args: DreamBoothArguments) -> list[DreamBoothArguments]:
    """Return the arguments of each folder: those of the run, and those in `--dataset_config`.

    Raises:
        ValueError: the file isn't a list of folders, or a folder has an unknown key or wrong value.
    """
    path = args.dataset_config
    if path is None:
        return [args]
    origin = f"--dataset_config {path}"
    entries = read_yaml(path, origin)
    if not entries or not isinstance(entries, list):
        raise ValueError(f"{origin} must be a list of folders, each `- instance_data_dir: FOLDER`.")
    kinds = kinds_of(type(args))
    options = {field.name: field.metadata for field in fields(args)}
    folders = []
    for number, entry in enumerate(entries, 1):
        place = f"{origin}, folder {number}: "
        if not isinstance(entry, dict):
            raise ValueError(f"{place}expected `key: value` lines, got {entry!r}.")
        values: dict[str, Any] = {"dataset_config": None}
        try:
            for key, value in entry.items():
                if key not in FOLDER_KEYS:
                    advice = (
                        f"here it is {OTHERS[key]}" if key in OTHERS else hint(key, FOLDER_KEYS)
                    )
                    raise ValueError(f"unrecognized {key}: {advice}")
                values[key] = converted(key, value, kinds[key], options[key])
            folders.append(replace(args, **values))
        except ValueError as error:
            raise ValueError(f"{place}{error}") from error
    return folders


def run_family(args: DreamBoothArguments, pipe: DiffusionPipeline | None = None) -> Family:
    """Return the family of a run, with the settings of `args`.

    Args:
        pipe: the pipeline of the run. Without it, the family is found by the name of the model.

    Raises:
        ValueError: the model belongs to no family, or an argument has no meaning for the family.
    """
    if pipe is None:
        family = family_of_model(args.pretrained_model_name_or_path, revision=args.revision)
    else:
        family = family_of(pipe)
    reasons = {}
    if not family.can_be_distilled:
        reasons["distill_to"] = "chooses its own timesteps or guidance"
    if family.boundary is not None:
        reasons["load_in_8bit"] = "has two transformers, and 8-bit weights can't leave the device"
        reasons["block_swap"] = "has two transformers, and only one is on the device"
        if args.expert in ("high", "low"):
            family = replace(family, expert=HIGH if args.expert == "high" else LOW)
    elif pipe is not None:
        reasons["expert"] = "has one denoiser"
    if not family.text_encoders:
        reasons["train_text_encoder"] = "can't be trained together with its text encoders"
    if not family.most_sources:
        reasons["source_data_dir"] = reasons["validation_source_dir"] = "doesn't edit images"
    if family.max_sequence_length is None:
        reasons["max_sequence_length"] = "has a fixed length of prompts"
    if family.guidance is None:
        reasons["training_guidance_scale"] = "has no distilled guidance"
    if family.is_flow:
        reasons["snr_gamma"] = "is a rectified flow, which --weighting_scheme weights"
    else:
        reasons["weighting_scheme"] = reasons["flow_shift"] = "is not a rectified flow"
    for name, reason in reasons.items():
        value = getattr(args, name)
        if value not in (None, False, "none"):
            raise ValueError(f"--{name} is {value}, but {family.title} {reason}: leave it out.")
    if args.max_sequence_length is not None:
        family = replace(family, max_sequence_length=args.max_sequence_length)
    if args.training_guidance_scale is not None:
        family = replace(family, guidance=args.training_guidance_scale)
    return family


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
