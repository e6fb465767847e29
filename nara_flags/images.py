"""The flags of train_scripts/dreambooth.py, with Diffusers' names where its script has them.

They stand in groups, with the checks that need only their values.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .options import (
    Count,
    Interval,
    NotNegative,
    NotNegativeInt,
    Positive,
    Range,
    Share,
    defaults_of,
    option,
)
from .training import AdapterArguments, TrainingArguments

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
WEIGHTING = ("cosmap", "sigma_sqrt")
SCHEMES = ("none", "logit_normal", "mode", *WEIGHTING)

Trajectories = Annotated[int, Range("at least 2", lambda count: count >= 2)]
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
    revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.", rare=True)
    variant: str | None = option(None, "Variant of the weight files, such as fp16.", rare=True)
    expert: str | None = option(
        None,
        "Which of Wan 2.2's two transformers to train: high noise, low noise, or both; none means both.",
        choices=("high", "low", "both"),
        rare=True,
    )
    block_swap: NotNegativeInt = option(
        0,
        "Frozen blocks of the denoiser that are on the host while others run; needs --gradient_checkpointing.",
        unit="blocks",
        rare=True,
    )
    max_sequence_length: NotNegativeInt | None = option(
        None,
        "Length of a prompt, if the model has a choice; none means what its pipeline does.",
        unit="tokens",
        rare=True,
    )
    training_guidance_scale: NotNegative | None = option(
        None,
        "Guidance scale that FLUX reads in training; none: the default of its samples.",
        rare=True,
    )


@dataclass
class DataArguments:
    """Images and captions"""

    instance_data_dir: str | None = option(
        None, "Folder with images of the subject, or captioned ones."
    )
    source_data_dir: str | None = option(
        None,
        "For models that edit: folder with the source of each image, by equal names; none reads the "
        "key source of metadata.jsonl.",
        rare=True,
    )
    instance_prompt: str | None = option(
        None,
        "What they show, with a rare word for the subject: 'a photo of sks dog'. "
        "Images without caption get it.",
    )
    caption_column: str | None = option(
        None, "Key of the captions in metadata.jsonl; none means text.", rare=True
    )
    dataset_config: str | None = option(
        None,
        "YAML list of several folders, each with flags of its own; docs/dreambooth.md.",
        rare=True,
    )
    trigger: str | None = option(
        None, "Word for the subject that replaces [trigger] in prompts and captions.", rare=True
    )
    repeats: Count = option(
        1, "Times that an epoch shows each image, for folders of unequal sizes.", rare=True
    )
    alpha_mask: bool = option(
        False,
        "Weight the loss by the alpha channel of images without a file in the folder mask.",
        rare=True,
    )
    mask_floor: Share = option(0.0, "Weight of the loss outside of masks.", rare=True)
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
    noise_offset: NotNegative = option(
        0.0,
        "Standard deviation of a shift of each channel's noise, usually 0.1 at most.",
        rare=True,
    )
    logit_mean: float = option(
        0.0,
        "Mean of logit_normal; above 0 means less noise, as in Diffusers' scripts.",
        rare=True,
    )
    logit_std: Positive = option(1.0, "Standard deviation of logit_normal.", rare=True)
    mode_scale: float = option(1.29, "Scale of the distribution mode.", rare=True)
    flow_shift: Positive | None = option(
        None,
        "The shift s in σ → s σ / (1 + (s − 1) σ); none: the scheduler's, or 1 if it depends on the size.",
        rare=True,
    )


@dataclass
class FewStepArguments:
    """Few steps (docs/few_steps.md)"""

    distill_to: FewSteps | None = option(
        None,
        "Teach the model to sample in so many steps, 1 to 8, without guidance. It needs prompts and no images; the "
        "teacher takes --num_inference_steps with --guidance_scale.",
        unit="steps",
    )
    prompts_file: str | None = option(
        None,
        "Text file with the prompts to distill, one per line; none: the instance and class prompts.",
    )
    trajectories: Trajectories = option(
        200, "Samples of the teacher, a tenth held out.", unit="samples", rare=True
    )
    trajectories_dir: str | None = option(
        None,
        "Folder to keep the teacher's samples in, for several runs; none means the output folder.",
        rare=True,
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
    num_inference_steps: Count = option(24, "Denoising steps of a sample.")
    guidance_scale: NotNegative = option(5.0, "Classifier-free guidance of samples; 1 disables it.")
    validation_data_dir: str | None = option(
        None,
        "Further images of the subject for the validation loss; none takes the training images, "
        "under other noise.",
        rare=True,
    )
    validation_source_dir: str | None = option(
        None, "The same as source_data_dir, for validation_data_dir.", rare=True
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
    sample_batch_size: Count = option(4, "Images to sample at once.", unit="images", rare=True)
    curve_points: Count = option(10, "Noise levels to measure the validation loss at.", rare=True)


@dataclass
class ImageFlags(
    ModelArguments,
    DataArguments,
    PriorArguments,
    ImageAdapterArguments,
    ValidationArguments,  # before the shared arguments, whose validation_steps it replaces
    TrainingArguments,
    ObjectiveArguments,
    FewStepArguments,
):
    """Teach an image model a subject from a few images, and measure the result.

    The adapter is NaRA or another. Models: Stable Diffusion 1, 2, XL and 3, FLUX.1, FLUX.2, Z-Image,
    Qwen-Image and Wan (one frame); FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit on pairs of images. The
    model's model_index.json says which it is, and that sets the defaults (resolution, guidance, adapted
    modules); docs/dreambooth.md has the table.

    The shipped model, a small rectified flow of SD3's classes, and images, offline, on CPU, in minutes:
        accelerate launch train_scripts/dreambooth.py
    Your own five images, on one GPU:
        accelerate launch train_scripts/dreambooth.py --pretrained_model_name_or_path MODEL \\
            --mixed_precision bf16 --instance_data_dir dog \\
            --instance_prompt "a photo of sks dog" --output_dir sks-dog
    With a file of settings for the model from train_scripts/configs; flags win over it:
        accelerate launch train_scripts/dreambooth.py \\
            --config train_scripts/configs/sdxl_dreambooth.yaml \\
            --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir sks-dog

    With --adapter lora, dora, … another method does the same; --help lists them. --init_adapter
    starts from a LoRA or NaRA. --min_noise_level and --max_noise_level train a part of the noise levels
    (docs/strength.md).

    The output folder then has: pytorch_nara_weights.safetensors (for pipe.load_nara_weights; for the
    files of other methods see nara_diffusion/dreambooth/denoiser.py), README.md (the model card,
    which says how to load them), samples.png (before and after), the samples themselves,
    noise_level_curve.png, results.json, metrics.jsonl, config.yaml, samples-by-step.png, and
    checkpoint-N folders to resume from.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill_to is not None:
            _check_distillation(self)
        elif self.dataset_config is not None:
            for name in ("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is set, but dataset_config has it for each folder: leave one of them out."
                    )
        elif self.instance_data_dir is None and self.plan is None:
            raise ValueError(
                "instance_data_dir is missing: name the folder of images to learn from."
            )
        _check_combinations(self)

    @property
    def prompts(self) -> list[str]:
        """The prompts of samples; empty if samples use the captions of the images."""
        if self.validation_prompts:
            return self.validation_prompts
        return [] if self.instance_prompt is None else [self.instance_prompt]


def _check_combinations(args: ImageFlags) -> None:
    if args.distill_to is None and (args.class_data_dir is None) != (args.class_prompt is None):
        raise ValueError(
            "prior preservation needs class_data_dir and class_prompt: give both, or neither."
        )
    if args.text_encoder_lr is not None and not args.train_text_encoder:
        raise ValueError(
            "text_encoder_lr is set, but the text encoders aren't trained: add train_text_encoder."
        )
    if args.block_swap and (args.load_in_8bit or not args.gradient_checkpointing):
        raise ValueError(
            f"block_swap is {args.block_swap}: it needs gradient_checkpointing, and can't be used with load_in_8bit, "
            "whose weights bitsandbytes keeps on the device. load_in_4bit is allowed."
        )
    if 0 < args.block_swap < 3:
        raise ValueError(
            f"block_swap is {args.block_swap}, which frees nothing: the block that runs and the next one are on the "
            "device. Give at least 3, or 0."
        )
    if args.validation_source_dir is not None and args.validation_data_dir is None:
        raise ValueError(
            "validation_source_dir has sources for validation_data_dir, which is missing: give both."
        )
    if args.snr_gamma is not None and args.weighting_scheme in WEIGHTING:
        raise ValueError(
            f"weighting_scheme {args.weighting_scheme!r} weights the errors, and so does snr_gamma: "
            "leave one out."
        )


_NO_PART = (
    "instance_data_dir", "source_data_dir", "validation_source_dir",
    "validation_data_dir", "class_data_dir", "caption_column", "identifier", "plan",
    "train_text_encoder", "min_noise_level", "max_noise_level", "stratified_timesteps", "curve_points",
    "snr_gamma", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "noise_offset", "caption_dropout",
    "random_flip", "center_crop", "aspect_ratio_buckets", "num_class_images", "prior_loss_weight",
    "flow_shift", "block_swap", "expert", "dataset_config", "trigger", "repeats",
    "alpha_mask", "mask_floor", "init_adapter",
)  # fmt: skip
"""Arguments that concern images, levels that a distillation sets itself, or its start."""


def _check_distillation(args: ImageFlags) -> None:
    """Raise ValueError for arguments that --distill_to can't be used with."""
    defaults = defaults_of(args)
    changed = [name for name in _NO_PART if getattr(args, name) != defaults[name]]
    if changed:
        raise ValueError(
            f"{changed[0]} is {getattr(args, changed[0])}, but distill_to learns from the teacher's samples, at its "
            "own steps: leave one of them out."
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
