"""The flags of dreambooth/train.py, in groups, with diffusers' names where its script has them."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from nara_diffusion.training.arguments import (
    AdapterArguments,
    Count,
    Interval,
    NotNegative,
    NotNegativeInt,
    Positive,
    Range,
    Share,
)
from nara_diffusion.training.command import option

from .families import TRANSFORMER_TARGETS

UNET_TARGETS = list(TRANSFORMER_TARGETS)
WEIGHTING = ("cosmap", "sigma_sqrt")
SCHEMES = ("none", "logit_normal", "mode", *WEIGHTING)


FewSteps = Annotated[int, Range("from 1 to 8", lambda steps: 1 <= steps <= 8)]


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
    max_sequence_length: NotNegativeInt | None = option(
        None,
        "tokens of a prompt, if the model has a choice; none means what its pipeline does",
        within="model_options",
    )
    training_guidance_scale: NotNegative | None = option(
        None,
        "guidance scale that FLUX reads in training; none: the default of its samples",
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
        "What they show, with a rare word for the subject: 'a photo of sks dog'. "
        "Images without caption get it.",
    )
    data_options: dict[str, Any] = option({}, "How images are read:", rare=True)
    caption_column: str | None = option(
        None, "key of the captions in metadata.jsonl", within="data_options"
    )
    resolution: Count = option(
        1024, "Side of the square that images are scaled and cut to.", unit="pixels"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Sizes height,width;height,width;…, or auto; each image takes the nearest. "
        "none means the square.",
        rare=True,
    )
    center_crop: bool = option(
        False, "Cut the middle, not one of a few random places at each draw.", rare=True
    )
    random_flip: bool = option(False, "Mirror half of the samples.", rare=True)
    caption_dropout: Share = option(
        0.0,
        "Share of samples with the empty prompt in place of their caption; class images keep theirs.",
        rare=True,
    )


@dataclass
class PriorArguments:
    """Prior preservation"""

    class_data_dir: str | None = option(
        None,
        "Folder of images of the class, to train on too, so that the model doesn't forget it. "
        "Missing ones are generated.",
        rare=True,
    )
    class_prompt: str | None = option(None, "What they show: 'a photo of a dog'.", rare=True)
    num_class_images: Count = option(100, "Number of class images.", rare=True)
    prior_loss_weight: NotNegative = option(1.0, "Weight of the loss on class images.", rare=True)


@dataclass
class ImageAdapterArguments(AdapterArguments):
    """Adapter"""

    target_modules: list[str] = option(
        UNET_TARGETS, "Names of the denoiser's modules to adapt, or all-linear."
    )
    train_text_encoder: bool = option(
        False,
        "Also adapt the text encoders of Stable Diffusion 1, 2 and XL, with the same options; "
        "C = I: they know no λ.",
        rare=True,
    )
    text_encoder_lr: Positive | None = option(
        None, "Learning rate of the text encoders; none means --learning_rate.", rare=True
    )


@dataclass
class ObjectiveArguments:
    """Objective"""

    stratified_timesteps: bool = option(
        False, "Spread the timesteps of each optimizer step evenly over the schedule.", rare=True
    )
    snr_gamma: Positive | None = option(
        None, "γ of min-SNR weights, usually 5; none weights all timesteps alike.", rare=True
    )
    weighting_scheme: str = option(
        "none",
        "For rectified flows: draw middle noise levels more often (logit_normal, mode), or weight "
        "their errors (cosmap, sigma_sqrt).",
        choices=SCHEMES,
        rare=True,
    )
    objective_options: dict[str, Any] = option({}, "Further settings of the objective:", rare=True)
    noise_offset: NotNegative = option(
        0.0,
        "standard deviation of a shift of each channel's noise, usually 0.1 at most",
        within="objective_options",
    )
    logit_mean: float = option(
        0.0,
        "mean of logit_normal; above 0 means less noise, as in Diffusers' scripts",
        within="objective_options",
    )
    logit_std: Positive = option(
        1.0, "standard deviation of logit_normal", within="objective_options"
    )
    mode_scale: float = option(1.29, "scale of mode", within="objective_options")
    flow_shift: Positive | None = option(
        None,
        "s of σ → s σ / (1 + (s − 1) σ); none: the scheduler's, or 1 if it depends on the size",
        within="objective_options",
    )


@dataclass
class FewStepArguments:
    """Few steps (docs/few_steps.md)"""

    distill_to: FewSteps | None = option(
        None,
        "Teach the model to sample in so many steps, 1 to 8, without guidance. It needs prompts and no images; the "
        "teacher takes --num_inference_steps with --guidance_scale, and --init_adapter is part of it.",
        unit="steps",
    )
    prompts_file: str | None = option(
        None,
        "Text file with the prompts to distill, one per line; none: the instance and class prompts.",
    )
    distillation_options: dict[str, Any] = option({}, "How the teacher is sampled:", rare=True)
    trajectories: int = option(
        200, "samples of the teacher, a tenth held out", within="distillation_options"
    )
    trajectories_dir: str | None = option(
        None,
        "folder to keep them in, for several runs; none means the output folder",
        within="distillation_options",
    )


@dataclass
class ValidationArguments:
    """Samples and measurement"""

    validation_prompts: list[str] | None = option(
        None,
        "Quoted prompts to sample before, after, and every --validation_steps; none takes the "
        "instance prompt, or without one the first four captions.",
        sentences=True,
    )
    validation_steps: Interval | None = option(
        0.25,
        "Sample and measure every so often; below 1, a share of all steps; none never.",
        unit="optimizer steps",
    )
    num_validation_images: Count = option(
        4, "Images for each prompt, with the seeds --seed, --seed + 1, ….", rare=True
    )
    num_inference_steps: Count = option(30, "Denoising steps of a sample.")
    guidance_scale: NotNegative = option(5.0, "Classifier-free guidance of samples; 1 disables it.")
    validation_data_dir: str | None = option(
        None,
        "Further images of the subject for the validation loss; none takes the training images, "
        "under other noise.",
        rare=True,
    )
    similarity_model: str | None = option(
        None, "DINO, DINOv2 or CLIP that compares samples with the subject: folder or Hub id."
    )
    alignment_model: str | None = option(
        None, "CLIP that compares samples with their prompts: folder or Hub id."
    )
    identifier: list[str] | None = option(
        None, "Words to leave out for it, such as sks, which it doesn't know.", rare=True
    )
    evaluation_options: dict[str, Any] = option(
        {}, "How samples are made and losses measured:", rare=True
    )
    sample_batch_size: Count = option(4, "images to sample at once", within="evaluation_options")
    curve_points: Count = option(
        10, "noise levels to measure the validation loss at", within="evaluation_options"
    )
