"""From the script's arguments to what a run trains on: images, class images, caches, objective, samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string

from nara_diffusion.training.adapters import adapter_config, check_target_modules
from nara_diffusion.training.arguments import window_of

from .cache import LatentCache, PromptCache
from .conversion import converted_scheduler
from .data.class_images import generate_class_images
from .data.dataset import DreamBoothDataset, TrainingSample
from .data.image_records import ImageRecord, Size, class_records, records_from_dataset, records_from_folder
from .draws import drawable_levels
from .evaluation.samples import sample_call
from .families.family import Family
from .families.table import family_of, family_of_model
from .image_arguments import DreamBoothArguments, check_family
from .objectives import Objective, build_objective

_CACHE_MEMORY = 1024  # MiB


def load_instances(args: DreamBoothArguments, progress: bool) -> list[ImageRecord]:
    """The subject's images with their captions, from a folder or the Hub; raises ValueError for bad ones."""
    if args.dataset_name is not None:
        return records_from_dataset(
            args.dataset_name,
            config_name=args.dataset_config_name,
            image_column=args.image_column,
            caption_column=args.caption_column,
            prompt=args.instance_prompt,
            progress=progress,
        )
    return records_from_folder(str(args.instance_data_dir), **_captions(args), progress=progress)


def load_held_out(args: DreamBoothArguments, progress: bool) -> list[ImageRecord]:
    """The images of `--validation_data_dir`; raises ValueError for bad ones."""
    if args.validation_data_dir is None:
        return []
    return records_from_folder(args.validation_data_dir, **_captions(args), progress=progress)


def _captions(args: DreamBoothArguments) -> dict[str, Any]:
    return {
        "prompt": args.instance_prompt,
        "caption_column": args.caption_column,
    }


def record_texts(records: Sequence[ImageRecord]) -> list[str]:
    """All that a sample depends on, for a digest."""
    return [text for record in records for text in (record.key, record.prompt)]


def load_class_images(
    args: DreamBoothArguments, accelerator: Accelerator, dtype: torch.dtype, load: Callable[..., Any], family: Family
) -> list[ImageRecord]:
    """The images of prior preservation, of which missing ones are generated; none without it.

    Args:
        dtype: of the generation.
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


def check_settings(args: DreamBoothArguments, pipe: Any) -> None:
    """Refuses what shows only with the model at hand, before hours go into class images.

    Raises:
        ValueError: sizes that the model can't have, an objective that doesn't fit its scheduler, a window without one
            of its noise levels, a target module that its denoiser lacks.
    """
    family = run_family(args, pipe)
    training_buckets(args, pipe)
    objective = run_objective(args, target_scheduler(args, pipe))
    drawable_levels(objective.noise_levels, window_of(args), **density_of(args))
    config = adapter_config(args, noise_convention=objective.source.convention)
    check_target_modules(getattr(pipe, family.denoiser), getattr(config, "target_modules", None))


def run_family(args: DreamBoothArguments, pipe: Any = None) -> Family:
    """The family of `pipe`, or before that is loaded of the model's name, with the conditions of `args`.

    Raises:
        ValueError: the model is of no family, or the family can't express an argument.
    """
    named = {"name": args.pretrained_model_name_or_path, "revision": args.revision}
    family = family_of_model(**named) if pipe is None else family_of(pipe)
    check_family(args, family)
    given = {"max_sequence_length": args.max_sequence_length, "guidance": args.training_guidance_scale}
    return replace(family, **{name: value for name, value in given.items() if value is not None})


def run_objective(args: DreamBoothArguments, scheduler: Any) -> Objective:
    """Build the objective of the run, with the weights that `args` give errors."""
    return build_objective(
        scheduler, snr_gamma=args.snr_gamma, shift=args.flow_shift, weighting_scheme=args.weighting_scheme
    )


def validation_objective(args: DreamBoothArguments, scheduler: Any) -> Objective:
    """The same without weights."""
    return build_objective(scheduler, shift=args.flow_shift)


def target_scheduler(args: DreamBoothArguments, pipe: Any) -> Any:
    """The scheduler that samples the trained model: the pipeline's own, unless the model is converted.

    Raises:
        ValueError: a base that can't be converted so.
    """
    return converted_scheduler(pipe.scheduler, args.prediction_type, args.rescale_betas_zero_snr)


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


def latent_cache(
    args: DreamBoothArguments, pipe: Any, dataset: DreamBoothDataset, positions: range, progress: bool
) -> LatentCache:
    """Latents of `dataset`; those that training will draw, at `positions` of the stream, are encoded now, if they fit.

    Raises:
        ValueError: the autoencoder gives NaN; the text says what to do about it.
    """
    if not args.cache_latents:
        return LatentCache(pipe.vae, memory_mib=0)
    latents = LatentCache(pipe.vae, memory_mib=_CACHE_MEMORY, folder=args.cache_folder)
    latents.fill(dataset.distinct_samples(positions), progress=progress)
    return latents


def prompt_cache(args: DreamBoothArguments, pipe: Any) -> PromptCache | None:
    """Embeddings of the prompts; None where the text encoders are trained."""
    if args.train_text_encoder:
        return None
    return PromptCache(pipe, run_family(args, pipe), memory_mib=_CACHE_MEMORY, folder=args.cache_folder)


def density_of(args: DreamBoothArguments) -> dict[str, Any]:
    """Return how often each noise level is drawn, as arguments of `drawable_levels`."""
    own = {name: getattr(args, name) for name in ("logit_mean", "logit_std", "mode_scale")}
    return {"scheme": args.weighting_scheme, **own}


def step_options(args: DreamBoothArguments) -> dict[str, Any]:
    """Return the arguments of `TrainingStep` that `args` set."""
    return {
        "seed": args.seed,
        "stratified": args.stratified_timesteps,
        "noise_offset": args.noise_offset,
        "prior_loss_weight": args.prior_loss_weight,
        "window": window_of(args),
        "density": density_of(args),
    }


def validation_samples(
    args: DreamBoothArguments, dataset: DreamBoothDataset, pipe: Any, held_out: Sequence[ImageRecord]
) -> list[TrainingSample]:
    """Return the samples of the validation loss: the held-out images, or the middles of the training images."""
    if not held_out:
        return dataset.plain_samples()
    return DreamBoothDataset(held_out, training_buckets(args, pipe), batch_size=1, seed=0).plain_samples()
