"""The arguments of train_scripts/dreambooth_sdxl.py, named as those of diffusers' own script where it has them."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nara_diffusion.dreambooth.data.captions import check_prompt
from nara_diffusion.training.adapters.methods import METHODS, method_of
from nara_diffusion.training.arguments.checks import check_arguments, require
from nara_diffusion.training.arguments.cli import option
from nara_diffusion.training.arguments.common import AdapterArguments, OptimizationArguments, RunArguments
from nara_diffusion.training.arguments.window import WindowArguments, check_window

from .average_arguments import AverageArguments, check_average
from .caption_arguments import CaptionArguments, check_captions
from .conversion import check_conversion
from .denoiser import UNET_TARGETS
from .foreign_flags import FOREIGN_FLAGS
from .loss_arguments import LossArguments, check_loss


@dataclass
class ModelArguments:
    """Model"""

    pretrained_model_name_or_path: str = option(
        "", "Folder or Hub id of the Stable Diffusion XL to adapt; none runs the shipped one.", content="base model"
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "Another autoencoder, such as madebyollin/sdxl-vae-fp16-fix.", content="base model"
    )
    revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.", content="base model")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.", content="base model")
    cache_dir: str | None = option(None, "Where downloads are kept; none means the Hub's usual cache.", resumable=True)
    upcast_vae: bool = option(True, "Encode images in float32 whatever the precision, as SDXL's autoencoder needs.")


@dataclass
class DataArguments:
    """Images and captions"""

    instance_data_dir: str | None = option(
        None,
        "Folder with images of the subject, or with subfolders named as kohya's, 10_sks dog: repeats and prompt.",
        content="training data",
    )
    instance_prompt: str | None = option(
        None, "What they show, with a rare word for the subject: 'a photo of sks dog'. Images without caption get it."
    )
    dataset_name: str | None = option(
        None, "Data set on the Hub, or a folder that `datasets` reads, in place of it.", content="training data"
    )
    dataset_config_name: str | None = option(None, "Configuration of that data set.")
    image_column: str = option("image", "Column of that data set with the images.")
    caption_column: str | None = option(None, "Column with the captions, there or in metadata.jsonl.")
    caption_source: str = option(
        "auto",
        "Captions of a folder: the prompt for all, a .txt or .caption beside each, metadata.jsonl, or what there is.",
        choices=("auto", "prompt", "text_files", "metadata"),
    )
    repeats: int = option(1, "How often an epoch shows each image; times what its folder's name says.", unit="times")
    resolution: int = option(1024, "Side of the square that images are scaled and cut to.", unit="pixels")
    aspect_ratio_buckets: str | None = option(
        None, "Sizes height,width;height,width;… of which each image takes the nearest, or auto; none means the square."
    )
    center_crop: bool = option(False, "Cut the middle; otherwise one of --crops_per_image random places at each draw.")
    crops_per_image: int | None = option(
        4, "Places of random crops, to bound the cache of latents; none means anywhere, anew each time.", unit="places"
    )
    random_flip: bool = option(False, "Mirror half of the samples.")
    cache_latents: bool = option(True, "Keep what the autoencoder says of each crop instead of running it each step.")
    cache_memory: float = option(1024, "Most that each cache, of latents and of prompts, holds in memory.", unit="MiB")
    cache_folder: str | None = option(None, "Keep the caches in this folder too, for later runs.", resumable=True)


@dataclass
class PriorArguments:
    """Prior preservation"""

    with_prior_preservation: bool = option(False, "Train on images of the class too, lest the model forgets it.")
    class_data_dir: str | None = option(
        None, "Folder of the class images; those that it lacks are generated.", content="training data"
    )
    class_prompt: str | None = option(None, "What they show: 'a photo of a dog'.")
    num_class_images: int = option(100, "Class images that have to be there.", unit="images")
    prior_loss_weight: float = option(1.0, "What the loss on class images counts.")
    prior_generation_precision: str | None = option(
        None,
        "Precision in which they are generated; none means that of the training.",
        choices=("no", "fp32", "fp16", "bf16"),
    )


@dataclass
class DreamBoothAdapterArguments(AdapterArguments):
    """Adapter"""

    target_modules: list[str] = option(UNET_TARGETS, "Names of the UNet's modules to adapt, or all-linear.")
    train_text_encoder: bool = option(
        False, "Also adapt both text encoders, with the same options; there C = I, since they know no λ."
    )
    text_encoder_lr: float | None = option(None, "Learning rate of those; none means --learning_rate.")
    adam_weight_decay_text_encoder: float | None = option(None, "Weight decay of those; none means --weight_decay.")


@dataclass
class ValidationArguments:
    """Samples and measurement"""

    validation_prompts: list[str] | None = option(
        None,
        "Quoted prompts to sample before, after, and every --validation_steps; none takes the instance prompt, or "
        "without one the first four captions.",
        sentences=True,
        aliases=("validation_prompt",),
    )
    validation_epochs: int | None = option(
        None, "Sample and measure every so often, in place of --validation_steps.", unit="epochs", resumable=True
    )
    num_validation_images: int = option(
        4, "Images for each of them, with the seeds --seed, --seed + 1, ….", unit="images"
    )
    num_inference_steps: int = option(30, "Denoising steps of a sample.", unit="steps")
    guidance_scale: float = option(5.0, "Classifier-free guidance of samples; 1 disables it.")
    sample_batch_size: int = option(4, "Images that are sampled at once.", unit="images")
    validation_data_dir: str | None = option(
        None,
        "Further images of the subject for the validation loss; none takes the training images, on other noise.",
        content="validation data",
    )
    similarity_model: str | None = option(
        None,
        "DINO, DINOv2 or CLIP that compares samples with the subject: folder or Hub id; none doesn't.",
        resumable=True,
    )
    alignment_model: str | None = option(
        None, "CLIP that compares samples with their prompts: folder or Hub id; none doesn't.", resumable=True
    )
    identifier: list[str] | None = option(None, "Words that it is not to read, such as sks, which it doesn't know.")
    curve_points: int = option(10, "Noise levels at which the validation loss is measured.", unit="points")


@dataclass
class DreamBoothArguments(
    ModelArguments,
    DataArguments,
    CaptionArguments,
    PriorArguments,
    DreamBoothAdapterArguments,
    OptimizationArguments,
    AverageArguments,
    LossArguments,
    WindowArguments,
    ValidationArguments,
    RunArguments,
):
    foreign_flags: ClassVar[Mapping[str, str]] = FOREIGN_FLAGS

    def __post_init__(self) -> None:
        check_arguments(self)
        require(self, "pretrained_model_name_or_path", self.pretrained_model_name_or_path != "", "given")
        _check_counts(self)
        _check_data(self)
        check_captions(self)
        _check_prior(self)
        check_average(self)
        check_loss(self)
        check_window(self)
        check_conversion(self.prediction_type, self.rescale_betas_zero_snr, self.do_edm_style_training)
        window = (self.min_noise_level, self.max_noise_level, self.hold_base_outside)
        if (self.prediction_type is not None or self.rescale_betas_zero_snr) and window != (None, None, None):
            raise ValueError(
                "a model that is converted at some noise levels alone predicts something else at the others: leave "
                "min_noise_level, max_noise_level and hold_base_outside out with prediction_type and "
                "rescale_betas_zero_snr."
            )
        if method_of(self).family == "prompt":
            having = ", ".join(name for name, method in METHODS.items() if method.family != "prompt")
            raise ValueError(
                f"adapter is {self.adapter!r}, whose virtual tokens stand before a language model's text, and a UNet "
                f"reads none: expected one of {having}."
            )
        if self.core_input != "noise_level":
            raise ValueError(f"core_input is {self.core_input!r}, but images have no masks: expected 'noise_level'.")

    @property
    def prompts(self) -> list[str]:
        """What is sampled, if it is named; else the images' captions are."""
        return self.validation_prompts or ([] if self.instance_prompt is None else [self.instance_prompt])


def _check_counts(args: Any) -> None:
    for name in ("num_validation_images", "num_inference_steps", "sample_batch_size", "curve_points", "repeats"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    require(args, "crops_per_image", args.crops_per_image is None or args.crops_per_image >= 1, "at least 1, or none")
    require(args, "resolution", args.resolution >= 8, "at least 8")
    require(
        args, "validation_epochs", args.validation_epochs is None or args.validation_epochs >= 1, "at least 1, or none"
    )
    decay = args.adam_weight_decay_text_encoder
    require(args, "adam_weight_decay_text_encoder", decay is None or decay >= 0, "at least 0, or none")
    rate = args.text_encoder_lr
    require(args, "text_encoder_lr", rate is None or rate > 0, "above 0, or none")
    for name in ("cache_memory", "prior_loss_weight", "guidance_scale"):
        require(args, name, getattr(args, name) >= 0, "at least 0")
    for prompt in args.validation_prompts or []:
        check_prompt(prompt, "a validation prompt")


def _check_data(args: Any) -> None:
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        got = "neither" if args.instance_data_dir is None else "both"
        raise ValueError(f"images come from instance_data_dir or from dataset_name: give one of them, got {got}.")
    if args.instance_prompt is not None:
        check_prompt(args.instance_prompt, "instance_prompt")
    for name in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
        if getattr(args, name) is not None and not args.train_text_encoder:
            raise ValueError(f"{name} is set, but the text encoders aren't trained: add train_text_encoder.")


def _check_prior(args: Any) -> None:
    missing = [name for name in ("class_data_dir", "class_prompt") if getattr(args, name) is None]
    if args.with_prior_preservation and missing:
        raise ValueError(f"with_prior_preservation needs {' and '.join(missing)}.")
    if not args.with_prior_preservation and len(missing) < 2:
        raise ValueError(
            "class images are for prior preservation: add with_prior_preservation, or leave class_data_dir and "
            "class_prompt out."
        )
    if args.with_prior_preservation:
        check_prompt(args.class_prompt, "class_prompt")
        require(args, "num_class_images", args.num_class_images >= 1, "at least 1")
