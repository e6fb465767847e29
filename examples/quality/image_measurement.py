"""What an image run is judged by: the loss on held-out pictures over λ, and samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from PIL.Image import Image

from nara_diffusion.dreambooth.denoiser import predict
from nara_diffusion.dreambooth.metrics import ImageSimilarity
from nara_diffusion.dreambooth.objectives import squared_errors
from nara_diffusion.dreambooth.sampling import SampleSettings, sample_images
from quality.image_task import PAIRS, HeldOut, ImageTask

FIRST_SAMPLE_SEED = 1000  # samples of training seed s start from noise 1000 + 100 s, …


@dataclass(frozen=True)
class Losses:
    """Attributes:
    means, errors: of each bin of λ, the mean over held-out pictures and its standard error.
    """

    means: list[float]
    errors: list[float]


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
    bins = [held_out_losses(unet, held_out) for held_out in task.held_out]
    means, errors = [fmean(losses) for losses in bins], [stdev(losses) / math.sqrt(len(losses)) for losses in bins]
    return Losses(means, errors)


def judged_samples(task: ImageTask, unet: Any, args: Any) -> Samples:
    """What `unet` draws, with whatever adapter and λ it has now."""
    settings = sample_settings(task, args)
    images = sample_images(_pipeline(task.pipe, unet), settings)
    prompts = [prompt for prompt, _ in settings.pairs]
    encoder = task.judge.images
    assert encoder is not None
    similarities = ImageSimilarity(encoder).similarities(images, task.judge.references)  # (n, 5)
    drawn = list(task.in_places)
    to_places = encoder.images(images) @ encoder.images(list(task.in_places.values())).T  # (n, places)
    own = [to_places[i, drawn.index(prompt)].item() for i, prompt in enumerate(prompts) if prompt in task.in_places]
    alignment = task.judge.alignment(images, prompts)
    assert alignment is not None
    return Samples(images, similarities.mean().item(), alignment, fmean(own))


@torch.no_grad()
def held_out_losses(unet: Any, held_out: HeldOut) -> list[float]:
    """The mean squared error of each held-out picture, over its noises."""
    batch = held_out.batch
    prediction = predict(unet, batch.model_input, batch.timestep, held_out.time_ids, held_out.embeddings)
    return squared_errors(prediction, batch).view(-1, 2 * PAIRS).mean(1).tolist()


def sample_settings(task: ImageTask, args: Any) -> SampleSettings:
    """`num_validation_images` of each prompt, from noise that depends on the run's seed and on nothing else."""
    call = {"height": args.resolution, "width": args.resolution}
    call |= {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    seed = FIRST_SAMPLE_SEED + 100 * args.seed
    return SampleSettings(task.sample_prompts, args.num_validation_images, seed, args.sample_batch_size, call)


def _pipeline(pipe: Any, unet: Any) -> Any:
    """`pipe` with another UNet and a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    options = {"force_zeros_for_empty_prompt": pipe.config.force_zeros_for_empty_prompt, "add_watermarker": False}
    other = type(pipe)(**{**pipe.components, "unet": unet, "scheduler": scheduler}, **options)
    other.set_progress_bar_config(disable=True)
    return other
