"""One subject of the image benchmark: its pictures, prompts and evaluator, and what a run is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch
from PIL.Image import Image

from nara_diffusion.dreambooth.fidelity import Encoder, text_alignment
from nara_diffusion.dreambooth.image_records import ImageRecord, records_from_folder
from nara_diffusion.dreambooth.pipelines import load_pipeline
from nara_diffusion.dreambooth.samples import SampleSettings, sample_images
from nara_diffusion.dreambooth.training_step import LatentCache, PromptCache
from quality.assets import ASSETS
from quality.images.held_out import (
    BACKBONE,
    BINS,
    IDENTIFIER,
    SUBJECTS,
    HeldOut,
    check_subject,
    held_out_bin,
    held_out_losses,
    instance_prompt,
    places_of,
)

# ---------------------------------------------------------------------- task

SAMPLED_PLACES = (
    "on the beach",
    "in the snow",
    "in the city",
    "in the forest",
    "in the desert",
    "at night",
    "on the grass",
)
"""That samples are asked for in."""


@dataclass(frozen=True)
class ImageTask:
    """Attributes:
    subject: its name, which is that of its kind.
    pipe: the frozen base model; runs work on copies of its UNet.
    latents, prompts: caches.
    instances: the five training pictures.
    held_out: one batch a bin of λ.
    references: the five pictures, decoded.
    encoder: judges samples.
    in_places: what `encoder` compares samples in a place with: the subject drawn there, {prompt: picture}.
    """

    subject: str
    pipe: Any
    latents: LatentCache
    prompts: PromptCache
    instances: list[ImageRecord]
    held_out: list[HeldOut]
    references: list[Image]
    encoder: Encoder
    in_places: dict[str, Image]

    @property
    def instance_prompt(self) -> str:
        return instance_prompt(self.subject)

    @property
    def sample_prompts(self) -> list[str]:
        """The instance prompt, and the subject in each of `SAMPLED_PLACES`."""
        return [self.instance_prompt, *(f"{self.instance_prompt} {place}" for place in SAMPLED_PLACES)]


@cache
def load_task(subject: str) -> ImageTask:
    """Everything that runs on `subject` share.

    Raises:
        ValueError: there is no such subject.
    """
    check_subject(subject)
    pipe = _base_model()
    latents = LatentCache(pipe.vae)
    prompts = PromptCache(pipe)
    instances = records_from_folder(ASSETS / SUBJECTS[subject], prompt=instance_prompt(subject), progress=False)
    held_out = [held_out_bin(pipe, latents, prompts, subject, index) for index in range(BINS)]
    return ImageTask(
        subject,
        pipe,
        latents,
        prompts,
        instances,
        held_out,
        [record.load() for record in instances],
        _encoder(),
        places_of(subject),
    )


@cache
def _base_model() -> Any:
    return load_pipeline(str(ASSETS / BACKBONE), dtype=torch.float32)


@cache
def _encoder() -> Encoder:
    return Encoder(ASSETS / "clip-tiny", device="cpu")


# ---------------------------------------------------------------------- measurement

FIRST_SAMPLE_SEED = 1000  # samples of training seed s start from noise 1000 + 100 s, …


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


def binned_losses(task: ImageTask, unet: Any) -> list[float]:
    """The mean loss in each bin of λ, of `unet` with whatever adapter and λ it has now."""
    return [fmean(held_out_losses(unet, held_out)) for held_out in task.held_out]


def judged_samples(task: ImageTask, unet: Any, args: Any) -> Samples:
    """What `unet` draws, with whatever adapter and λ it has now."""
    settings = sample_settings(task, args)
    scheduler = type(task.pipe.scheduler).from_config(task.pipe.scheduler.config)
    images = sample_images(pipeline_of(task.pipe, unet, scheduler), settings)
    prompts = [prompt for prompt, _ in settings.pairs]
    encoder = task.encoder
    similarities = encoder.images(images) @ encoder.images(task.references).T  # (n, 5)
    drawn = list(task.in_places)
    to_places = encoder.images(images) @ encoder.images(list(task.in_places.values())).T  # (n, places)
    own = [to_places[i, drawn.index(prompt)].item() for i, prompt in enumerate(prompts) if prompt in task.in_places]
    alignment = text_alignment(encoder, images, prompts, [IDENTIFIER])
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
