"""The arguments of dreambooth/train.py, named as those of diffusers' own script where it has them."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nara_diffusion.training.adapters import method_of
from nara_diffusion.training.argument_checks import check_arguments, require
from nara_diffusion.training.arguments import AdapterArguments, TrainingArguments
from nara_diffusion.training.options import option, spread_options

from .captions import check_prompt
from .family import TRANSFORMER_TARGETS, Family
from .pipelines import family_of, family_of_model

UNET_TARGETS = list(TRANSFORMER_TARGETS)
WEIGHTING = ("cosmap", "sigma_sqrt")
SCHEMES = ("none", "logit_normal", "mode", *WEIGHTING)


@dataclass
class ModelArguments:
    """Model"""

    pretrained_model_name_or_path: str = option(
        "", "Folder or Hub id of the model to adapt, which has a model_index.json."
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "Another autoencoder, such as madebyollin/sdxl-vae-fp16-fix.", rare=True
    )
    model_options: dict[str, Any] = option({}, "How it is loaded and called:", rare=True)
    revision: str | None = option(None, "branch, tag or commit", within="model_options")
    variant: str | None = option(
        None, "variant of the weight files, such as fp16", within="model_options"
    )
    max_sequence_length: int | None = option(
        None,
        "tokens of a prompt, where there is a choice; none means what its pipeline does",
        within="model_options",
    )
    training_guidance_scale: float | None = option(
        None,
        "what distilled guidance (FLUX) reads in training; none: its samples' default",
        within="model_options",
    )


@dataclass
class DataArguments:
    """Images and captions"""

    instance_data_dir: str | None = option(
        None, "Folder with images of the subject, or captioned ones."
    )
    instance_prompt: str | None = option(
        None,
        "What they show, with a rare word for the subject: 'a photo of sks dog'. Images without caption get it.",
    )
    data_options: dict[str, Any] = option({}, "How images are read:", rare=True)
    caption_column: str | None = option(
        None, "key of the captions in metadata.jsonl", within="data_options"
    )
    crops_per_image: int | None = option(
        4,
        "places of random crops, to bound the cache of latents; none means anywhere",
        within="data_options",
    )
    resolution: int = option(
        1024, "Side of the square that images are scaled and cut to.", unit="pixels"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Sizes height,width;height,width;… of which each image takes the nearest, or auto; none means the square.",
        rare=True,
    )
    center_crop: bool = option(
        False, "Cut the middle; otherwise one of a few random places at each draw.", rare=True
    )
    random_flip: bool = option(False, "Mirror half of the samples.", rare=True)
    caption_dropout: float = option(
        0.0,
        "Share of samples with the empty prompt in place of their caption; class images keep theirs.",
        rare=True,
    )


@dataclass
class PriorArguments:
    """Prior preservation"""

    class_data_dir: str | None = option(
        None,
        "Folder of images of the class, trained on too, lest the model forgets it; those that it lacks are generated.",
        rare=True,
    )
    class_prompt: str | None = option(None, "What they show: 'a photo of a dog'.", rare=True)
    num_class_images: int = option(100, "Class images that have to be there.", rare=True)
    prior_loss_weight: float = option(1.0, "What the loss on class images counts.", rare=True)


@dataclass
class ImageAdapterArguments(AdapterArguments):
    """Adapter"""

    target_modules: list[str] = option(
        UNET_TARGETS, "Names of the denoiser's modules to adapt, or all-linear."
    )
    train_text_encoder: bool = option(
        False,
        "Also adapt the text encoders of Stable Diffusion 1, 2 and XL, by the same options; C = I: they know no λ.",
        rare=True,
    )
    text_encoder_lr: float | None = option(
        None, "Learning rate of those; none means --learning_rate.", rare=True
    )


@dataclass
class ObjectiveArguments:
    """Objective"""

    stratified_timesteps: bool = option(
        False, "Spread the timesteps of each optimizer step evenly over the schedule.", rare=True
    )
    snr_gamma: float | None = option(
        None, "γ of min-SNR weights, 5 as a rule; none weights all timesteps alike.", rare=True
    )
    weighting_scheme: str = option(
        "none",
        "Of rectified flows: draw middle noise levels more often (logit_normal, mode) or weight their errors (cosmap, "
        "sigma_sqrt).",
        choices=SCHEMES,
        rare=True,
    )
    objective_options: dict[str, Any] = option({}, "Further settings of the objective:", rare=True)
    noise_offset: float = option(
        0.0,
        "standard deviation of a shift of each channel's noise, 0.1 at most as a rule",
        within="objective_options",
    )
    logit_mean: float = option(
        0.0,
        "mean of logit_normal; above 0 means less noise, as in Diffusers' scripts",
        within="objective_options",
    )
    logit_std: float = option(1.0, "standard deviation of logit_normal", within="objective_options")
    mode_scale: float = option(1.29, "scale of mode", within="objective_options")
    flow_shift: float | None = option(
        None,
        "s of σ → s σ / (1 + (s − 1) σ); none: the scheduler's, 1 if by size",
        within="objective_options",
    )


@dataclass
class ValidationArguments:
    """Samples and measurement"""

    validation_prompts: list[str] | None = option(
        None,
        "Quoted prompts to sample before, after, and every --validation_steps; none takes the instance prompt, or "
        "without one the first four captions.",
        sentences=True,
    )
    num_validation_images: int = option(
        4, "Images for each of them, with the seeds --seed, --seed + 1, ….", rare=True
    )
    num_inference_steps: int = option(30, "Denoising steps of a sample.")
    guidance_scale: float = option(5.0, "Classifier-free guidance of samples; 1 disables it.")
    validation_data_dir: str | None = option(
        None,
        "Further images of the subject for the validation loss; none takes the training images, on other noise.",
        rare=True,
    )
    similarity_model: str | None = option(
        None, "DINO, DINOv2 or CLIP that compares samples with the subject: folder or Hub id."
    )
    alignment_model: str | None = option(
        None, "CLIP that compares samples with their prompts: folder or Hub id."
    )
    identifier: list[str] | None = option(
        None, "Words that it is not to read, such as sks, which it doesn't know.", rare=True
    )
    evaluation_options: dict[str, Any] = option(
        {}, "How samples are made and losses measured:", rare=True
    )
    sample_batch_size: int = option(
        4, "images that are sampled at once", within="evaluation_options"
    )
    curve_points: int = option(
        10, "noise levels at which the validation loss is measured", within="evaluation_options"
    )


@dataclass
class DreamBoothArguments(
    ModelArguments,
    DataArguments,
    PriorArguments,
    ImageAdapterArguments,
    TrainingArguments,
    ObjectiveArguments,
    ValidationArguments,
):
    def __post_init__(self) -> None:
        spread_options(self)
        if not self.pretrained_model_name_or_path:
            raise ValueError("pretrained_model_name_or_path is empty: name the model to adapt.")
        check_arguments(self)
        counts = (
            "num_validation_images",
            "num_inference_steps",
            "sample_batch_size",
            "curve_points",
        )
        require(
            self,
            "at least 1",
            lambda value: value >= 1,
            *counts,
            "crops_per_image",
            "num_class_images",
        )
        require(self, "at least 8", lambda value: value >= 8, "resolution")
        require(
            self,
            "above 0",
            lambda value: value > 0,
            "text_encoder_lr",
            "snr_gamma",
            "logit_std",
            "flow_shift",
        )
        least_0 = ("prior_loss_weight", "guidance_scale", "noise_offset", "max_sequence_length")
        require(self, "at least 0", lambda value: value >= 0, *least_0, "training_guidance_scale")
        require(self, "in [0, 1], a probability", lambda value: 0 <= value <= 1, "caption_dropout")
        if self.instance_data_dir is None:
            raise ValueError(
                "instance_data_dir is missing: name the folder of images to learn from."
            )
        for name in ("instance_prompt", "class_prompt"):
            if (prompt := getattr(self, name)) is not None:
                check_prompt(prompt, name)
        for prompt in self.validation_prompts or []:
            check_prompt(prompt, "a validation prompt")
        _check_combinations(self)

    @property
    def prompts(self) -> list[str]:
        """Return the prompts to sample, if any are named; otherwise the images' captions are sampled."""
        return self.validation_prompts or (
            [] if self.instance_prompt is None else [self.instance_prompt]
        )


def _check_combinations(args: Any) -> None:
    method = method_of(args).family
    mistakes = {
        f"adapter {args.adapter} puts virtual tokens before a language model's text: choose another.": (
            method == "prompt"
        ),
        f"adapter {args.adapter} trains all weights, which Diffusers' scripts do for images: choose another.": (
            method == "full"
        ),
        "prior preservation needs class_data_dir and class_prompt: give both, or neither.": (
            (args.class_data_dir is None) != (args.class_prompt is None)
        ),
        "text_encoder_lr is set, but the text encoders aren't trained: add train_text_encoder.": (
            args.text_encoder_lr is not None and not args.train_text_encoder
        ),
        f"weighting_scheme {args.weighting_scheme!r} weights the errors, and so does snr_gamma: leave one out.": (
            args.snr_gamma is not None and args.weighting_scheme in WEIGHTING
        ),
    }
    for mistake, is_made in mistakes.items():
        if is_made:
            raise ValueError(mistake)


def run_family(args: Any, pipe: Any = None) -> Family:
    """The family of `pipe`, or before that is loaded of the model's name, with the settings of `args`.

    Raises:
        ValueError: the model is of no family, or the family can't express an argument.
    """
    named = {"name": args.pretrained_model_name_or_path, "revision": args.revision}
    family = family_of_model(**named) if pipe is None else family_of(pipe)
    unread = {  # argument: (whether the family can't express it, why)
        "train_text_encoder": (
            not family.text_encoders,
            "is trained with its text encoders as they are",
        ),
        "max_sequence_length": (
            family.max_sequence_length is None,
            "reads the tokens that its CLIP has places for",
        ),
        "training_guidance_scale": (family.guidance is None, "has no distilled guidance"),
        "snr_gamma": (
            family.is_flow,
            "is a rectified flow, whose weights are --weighting_scheme's",
        ),
        "weighting_scheme": (not family.is_flow, "is no rectified flow"),
        "flow_shift": (not family.is_flow, "is no rectified flow"),
    }
    for name, (is_unread, why) in unread.items():
        if is_unread and getattr(args, name) not in (None, False, "none"):
            raise ValueError(
                f"{name} is {getattr(args, name)}, but {family.title} {why}: leave it out."
            )
    given = {
        "max_sequence_length": args.max_sequence_length,
        "guidance": args.training_guidance_scale,
    }
    return replace(family, **{name: value for name, value in given.items() if value is not None})
