"""What an image run is judged by: the loss on held-out pictures over λ, and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from PIL.Image import Image

from nara_diffusion.dreambooth.evaluation.fidelity import text_alignment
from nara_diffusion.dreambooth.evaluation.samples import SampleSettings, sample_images
from quality.images.held_out import held_out_losses
from quality.images.task import ImageTask

FIRST_SAMPLE_SEED = 1000  # samples of training seed s start from noise 1000 + 100 s, …


@dataclass(frozen=True)
class Losses:
    """Attributes:
    means, errors: of each bin of λ, the mean over held-out pictures and its standard error.
    gain_error: the standard error of the mean gain over the backbone as it is, of all bins together. Pictures differ
        more than gains on them do, so that this is what tells one method from another.
    """

    means: list[float]
    errors: list[float]
    gain_error: float


@dataclass(frozen=True)
class Samples:
    """Attributes:
    images: all of them.
    similarity: to the five training pictures, mean cosine.
    text_alignment: to their prompts, mean cosine.
    place_similarity: of those in a place to the subject drawn in that place, mean cosine.
    """

    images: list[Image]
    similarity: float
    text_alignment: float
    place_similarity: float


def binned_losses(task: ImageTask, unet: Any) -> Losses:
    """Of `unet` with whatever adapter and λ it has now."""
    bins, errors, gain_errors = [], [], []
    for held_out, before in zip(task.held_out, task.base_losses, strict=True):
        losses = held_out_losses(unet, held_out)
        gains = [base - own for base, own in zip(before, losses, strict=True)]
        bins.append(fmean(losses))
        errors.append(stratified_error(losses, held_out.kinds))
        gain_errors.append(stratified_error(gains, held_out.kinds))
    return Losses(bins, errors, math.hypot(*gain_errors) / len(bins))  # no picture is in two bins


def stratified_error(values: Sequence[float], strata: Sequence[str]) -> float:
    """The standard error of the mean of a stratified sample whose strata are as large as in what it is drawn from:
    √(Σ_s n_s² σ_s² / n_s) / n, with σ_s within stratum s. Too large, if anything: that all places are in each bin
    alike, and timesteps spread over it, isn't taken into account."""
    groups: dict[str, list[float]] = {}
    for value, stratum in zip(values, strata, strict=True):
        groups.setdefault(stratum, []).append(value)
    return math.sqrt(sum(len(group) * variance(group) for group in groups.values())) / len(values)


def judged_samples(task: ImageTask, unet: Any, args: Any) -> Samples:
    """What `unet` draws, with whatever adapter and λ it has now."""
    settings = sample_settings(task, args)
    scheduler = type(task.pipe.scheduler).from_config(task.pipe.scheduler.config)
    images = sample_images(pipeline_of(task.pipe, unet, scheduler), settings)
    prompts = [prompt for prompt, _ in settings.pairs]
    encoder = task.judge.images
    assert encoder is not None
    similarities = encoder.images(images) @ encoder.images(task.judge.references).T  # (n, 5)
    drawn = list(task.in_places)
    to_places = encoder.images(images) @ encoder.images(list(task.in_places.values())).T  # (n, places)
    own = [to_places[i, drawn.index(prompt)].item() for i, prompt in enumerate(prompts) if prompt in task.in_places]
    alignment = text_alignment(encoder, images, prompts, task.judge.identifier)
    assert alignment is not None
    return Samples(images, similarities.mean().item(), alignment, fmean(own))


def sample_settings(task: ImageTask, args: Any) -> SampleSettings:
    """`num_validation_images` of each prompt, from noise that depends on the run's seed and on nothing else."""
    call = {"height": args.resolution, "width": args.resolution}
    call |= {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    seed = FIRST_SAMPLE_SEED + 100 * args.seed
    return SampleSettings(task.sample_prompts, args.num_validation_images, seed, args.sample_batch_size, call)


def pipeline_of(pipe: Any, unet: Any, scheduler: Any) -> Any:
    """`pipe` with another UNet and scheduler; itself unchanged."""
    options = {"force_zeros_for_empty_prompt": pipe.config.force_zeros_for_empty_prompt, "add_watermarker": False}
    other = type(pipe)(**{**pipe.components, "unet": unet, "scheduler": scheduler}, **options)
    other.set_progress_bar_config(disable=True)
    return other
