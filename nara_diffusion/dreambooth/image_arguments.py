"""The arguments of dreambooth/train.py, with their checks and the family that they select."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from nara_diffusion.training.adapters import check_adapter, method_of
from nara_diffusion.training.arguments import check_arguments
from nara_flags.images import ImageFlags

from .captions import check_prompt
from .families import Family
from .pipelines import family_of, family_of_model


@dataclass
class DreamBoothArguments(ImageFlags):
    """The flags, after the checks that need libraries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arguments(self)
        check_adapter(self)
        method = method_of(self).family
        if method == "prompt":
            raise ValueError(
                f"adapter {self.adapter} puts virtual tokens before a language model's text: choose "
                "another."
            )
        if method == "full":
            raise ValueError(
                f"adapter {self.adapter} trains all weights, which Diffusers' scripts do for images: "
                "choose another."
            )
        if self.instance_prompt is not None:
            check_prompt(self.instance_prompt, "instance_prompt")
        if self.class_prompt is not None:
            check_prompt(self.class_prompt, "class_prompt")
        for prompt in self.validation_prompts or []:
            check_prompt(prompt, "a validation prompt")


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
