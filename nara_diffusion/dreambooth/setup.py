"""From the script's arguments to what a run trains on: the family, images, class images, samples, the training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string

from nara_diffusion.training.arguments import window_of

from .cache import LatentCache, PromptCache
from .data.class_images import generate_class_images
from .data.dataset import DreamBoothDataset
from .data.image_records import ImageRecord, Size, class_records, records_from_dataset, records_from_folder
from .draws import drawable_levels
from .evaluation.samples import sample_call
from .families.family import Family
from .families.table import family_of, family_of_model
from .image_arguments import DreamBoothArguments, check_family
from .objectives import build_objective
from .training_step import TrainingStep


def run_family(args: DreamBoothArguments, pipe: Any = None) -> Family:
    """The family of `pipe`, or before that is loaded of the model's name, with the settings of `args`.

    Raises:
        ValueError: the model is of no family, or the family can't express an argument.
    """
    named = {"name": args.pretrained_model_name_or_path, "revision": args.revision}
    family = family_of_model(**named) if pipe is None else family_of(pipe)
    check_family(args, family)
    given = {"max_sequence_length": args.max_sequence_length, "guidance": args.training_guidance_scale}
    return replace(family, **{name: value for name, value in given.items() if value is not None})


def load_images(args: DreamBoothArguments, progress: bool) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The captioned images of the subject and of `--validation_data_dir`; raises ValueError for bad ones."""
    captions: dict[str, Any] = {"prompt": args.instance_prompt, "caption_column": args.caption_column}
    if args.dataset_name is not None:
        instances = records_from_dataset(
            args.dataset_name,
            config_name=args.dataset_config_name,
            image_column=args.image_column,
            progress=progress,
            **captions,
        )
    else:
        instances = records_from_folder(str(args.instance_data_dir), progress=progress, **captions)
    if args.validation_data_dir is None:
        return instances, []
    return instances, records_from_folder(args.validation_data_dir, progress=progress, **captions)


def record_texts(records: Sequence[ImageRecord]) -> list[str]:
    """All that a sample depends on, for a digest."""
    return [text for record in records for text in (record.key, record.prompt)]


def load_class_images(
    args: DreamBoothArguments, accelerator: Accelerator, dtype: torch.dtype, load: Callable[..., Any], family: Family
) -> list[ImageRecord]:
    """The images of prior preservation, of which missing ones are generated in `dtype`; none without it.

    Args:
        load: `load_pipeline` with all but its dtypes given.
        family: of the model.
    """
    if not args.with_prior_preservation:
        return []
    folder, prompt = str(args.class_data_dir), str(args.class_prompt)
    generate_class_images(
        lambda: load(dtype=dtype, vae_dtype=dtype).to(accelerator.device),
        folder,
        prompt,
        args.num_class_images,
        seed=args.seed,
        batch_size=args.sample_batch_size,
        accelerator=accelerator,
        progress=accelerator.is_main_process,
        **sample_call(args, family),
    )
    return class_records(folder, prompt=prompt, progress=accelerator.is_main_process)


def training_buckets(args: DreamBoothArguments, pipe: Any) -> list[Size]:
    """The sizes to train at: multiples of what autoencoder and denoiser divide an image by, together.

    Raises:
        ValueError: sizes that aren't.
    """
    divisor = family_of(pipe).divisor(pipe)
    if args.aspect_ratio_buckets == "auto":
        return generate_aspect_ratio_buckets(args.resolution, max(divisor, min(64, args.resolution // 4)))
    sizes = [(args.resolution, args.resolution)]
    if args.aspect_ratio_buckets is not None:
        sizes = parse_buckets_string(args.aspect_ratio_buckets)
    for height, width in sizes:
        if height % divisor or width % divisor:
            raise ValueError(
                f"a training size of {height} x {width} pixels doesn't fit this model: both sides have to be multiples "
                f"of {divisor}."
            )
    return sizes


def training_data(
    args: DreamBoothArguments, instances: Sequence[ImageRecord], class_images: Sequence[ImageRecord], pipe: Any
) -> DreamBoothDataset:
    """The samples of training."""
    return DreamBoothDataset(
        instances,
        training_buckets(args, pipe),
        batch_size=args.train_batch_size,
        seed=args.seed,
        class_images=class_images,
        crop="center" if args.center_crop else "random",
        crops_per_image=args.crops_per_image,
        flip=args.random_flip,
        caption_dropout=args.caption_dropout,
    )


def training_step(
    args: DreamBoothArguments, pipe: Any, family: Family, scheduler: Any, device: torch.device, group_size: int
) -> TrainingStep:
    """The loss of the run, of the denoiser of `pipe`.

    Args:
        scheduler: of the model as it is trained (`converted_scheduler`).
        group_size: samples of an optimizer step.

    Raises:
        ValueError: an objective that doesn't fit the scheduler, or a window without one of its noise levels.
    """
    weights = {"snr_gamma": args.snr_gamma, "shift": args.flow_shift, "weighting_scheme": args.weighting_scheme}
    objective = build_objective(scheduler, **weights)
    density = {name: getattr(args, name) for name in ("logit_mean", "logit_std", "mode_scale")}
    prompts = None if args.train_text_encoder else PromptCache(pipe, family, folder=args.cache_folder)
    latents = LatentCache(pipe.vae, memory_mib=0)
    if args.cache_latents:
        latents = LatentCache(pipe.vae, folder=args.cache_folder)
    return TrainingStep(
        model=getattr(pipe, family.denoiser),
        objective=objective,
        latents=latents,
        prompts=prompts,
        device=device,
        seed=args.seed,
        group_size=group_size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
        prior_loss_weight=args.prior_loss_weight,
        drawable=drawable_levels(objective.noise_levels, window_of(args), args.weighting_scheme, **density),
    )
