"""The arguments of dreambooth/train.py, with their checks and the family that they select."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from nara_diffusion.training.adapters import check_adapter, method_of
from nara_diffusion.training.arguments import TrainingArguments, check_arguments
from nara_diffusion.training.command import default_of, spread_options

from .captions import check_prompt
from .families import Family
from .image_options import (
    WEIGHTING,
    DataArguments,
    FewStepArguments,
    ImageAdapterArguments,
    ModelArguments,
    ObjectiveArguments,
    PriorArguments,
    ValidationArguments,
)
from .pipelines import family_of, family_of_model


@dataclass
class DreamBoothArguments(
    ModelArguments,
    DataArguments,
    PriorArguments,
    ImageAdapterArguments,
    TrainingArguments,
    ObjectiveArguments,
    FewStepArguments,
    ValidationArguments,
):
    def __post_init__(self) -> None:
        spread_options(self)
        if not self.pretrained_model_name_or_path:
            raise ValueError("pretrained_model_name_or_path is empty: name the model to adapt.")
        check_arguments(self)
        check_adapter(self)
        if self.distill_to is not None:
            _check_distillation(self)
        elif self.instance_data_dir is None and self.plan is None:
            raise ValueError(
                "instance_data_dir is missing: name the folder of images to learn from."
            )
        if self.instance_prompt is not None:
            check_prompt(self.instance_prompt, "instance_prompt")
        if self.class_prompt is not None:
            check_prompt(self.class_prompt, "class_prompt")
        for prompt in self.validation_prompts or []:
            check_prompt(prompt, "a validation prompt")
        _check_combinations(self)

    @property
    def prompts(self) -> list[str]:
        """The prompts of samples; empty if samples use the captions of the images."""
        if self.validation_prompts:
            return self.validation_prompts
        return [] if self.instance_prompt is None else [self.instance_prompt]


def _check_combinations(args: DreamBoothArguments) -> None:
    method = method_of(args).family
    if method == "prompt":
        raise ValueError(
            f"adapter {args.adapter} puts virtual tokens before a language model's text: choose "
            "another."
        )
    if method == "full":
        raise ValueError(
            f"adapter {args.adapter} trains all weights, which Diffusers' scripts do for images: "
            "choose another."
        )
    if args.distill_to is None and (args.class_data_dir is None) != (args.class_prompt is None):
        raise ValueError(
            "prior preservation needs class_data_dir and class_prompt: give both, or neither."
        )
    if args.text_encoder_lr is not None and not args.train_text_encoder:
        raise ValueError(
            "text_encoder_lr is set, but the text encoders aren't trained: add train_text_encoder."
        )
    if args.snr_gamma is not None and args.weighting_scheme in WEIGHTING:
        raise ValueError(
            f"weighting_scheme {args.weighting_scheme!r} weights the errors, and so does snr_gamma: "
            "leave one out."
        )


_NO_PART = (
    "instance_data_dir", "validation_data_dir", "class_data_dir", "caption_column", "identifier", "plan",
    "train_text_encoder", "min_noise_level", "max_noise_level", "stratified_timesteps", "curve_points",
    "snr_gamma", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "noise_offset", "caption_dropout",
    "random_flip", "center_crop", "aspect_ratio_buckets", "num_class_images", "prior_loss_weight",
    "flow_shift",
)  # fmt: skip
"""Arguments that concern images, or levels that a distillation sets itself."""


def _check_distillation(args: DreamBoothArguments) -> None:
    """Raise ValueError for arguments that --distill_to can't be used with."""
    defaults = {field.name: default_of(field) for field in dataclasses.fields(args)}
    given = [name for name in _NO_PART if getattr(args, name) != defaults[name]]
    if given:
        raise ValueError(
            f"{given[0]} is {getattr(args, given[0])}, but distill_to learns from the teacher's samples, at its own "
            "steps: leave one of them out."
        )
    if args.prompts_file is not None and args.class_prompt is not None:
        raise ValueError(
            "prompts_file has the prompts of the trajectories: add class_prompt to it as a line, or leave one out."
        )
    steps, student = args.num_inference_steps, args.distill_to or 1
    if steps % student or steps == student:
        raise ValueError(
            f"num_inference_steps is {steps} and distill_to {student}: the teacher's steps have to be a multiple of "
            f"the student's, such as {student * max(2, round(steps / student))}."
        )
    if args.prompts_file is None and args.instance_prompt is None:
        raise ValueError("distill_to needs prompts: give prompts_file or instance_prompt.")


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
    for name, why in _without_meaning(family).items():
        value = getattr(args, name)
        if value not in (None, False, "none"):
            raise ValueError(f"{name} is {value}, but {family.title} {why}: leave it out.")
    if args.max_sequence_length is not None:
        family = replace(family, max_sequence_length=args.max_sequence_length)
    if args.training_guidance_scale is not None:
        family = replace(family, guidance=args.training_guidance_scale)
    return family


def _without_meaning(family: Family) -> dict[str, str]:
    """Return {argument: reason} of the arguments that have no meaning for a family."""
    reasons = {}
    if not family.text_encoders:
        reasons["train_text_encoder"] = "is trained with its text encoders as they are"
    if family.max_sequence_length is None:
        reasons["max_sequence_length"] = "reads the tokens that its CLIP has places for"
    if family.guidance is None:
        reasons["training_guidance_scale"] = "has no distilled guidance"
    if family.is_flow:
        reasons["snr_gamma"] = "is a rectified flow, which --weighting_scheme weights"
    else:
        reasons["weighting_scheme"] = "isn't a rectified flow"
        reasons["flow_shift"] = "isn't a rectified flow"
    return reasons
