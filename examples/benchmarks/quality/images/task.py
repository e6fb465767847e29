"""One subject of the image benchmark: its pictures, prompts and judge, all that its runs share, made once a process.

The base model, latents of the five training pictures, embeddings of prompts, and the held-out pictures as noisy latents
depend neither on the method nor on the seed, so that a run costs its steps, its samples, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL.Image import Image

from nara_diffusion.dreambooth.cache import LatentCache, PromptCache
from nara_diffusion.dreambooth.data.image_records import ImageRecord, records_from_folder
from nara_diffusion.dreambooth.evaluation.comparison import Evaluator
from nara_diffusion.dreambooth.evaluation.fidelity import Encoder
from nara_diffusion.dreambooth.families.pipelines import load_pipeline
from quality.assets import ASSETS
from quality.images.held_out import BINS, HeldOut, held_out_bin, held_out_losses, places_of
from quality.images.subjects import BACKBONE, IDENTIFIER, SUBJECTS, check_subject, instance_prompt

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
    base_losses: of the backbone as it is, (bins, pictures of one).
    judge: of samples.
    in_places: what `judge` compares samples in a place with: the subject drawn there, {prompt: picture}.
    """

    subject: str
    pipe: Any
    latents: LatentCache
    prompts: PromptCache
    instances: list[ImageRecord]
    held_out: list[HeldOut]
    base_losses: list[list[float]]
    judge: Evaluator
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
    pipe, judge = _base_model(), _encoder()
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
        [held_out_losses(pipe.unet, batch) for batch in held_out],
        Evaluator([record.load() for record in instances], judge, judge, [IDENTIFIER]),
        places_of(subject),
    )


@cache
def _base_model() -> Any:
    return load_pipeline(str(ASSETS / BACKBONE), dtype=torch.float32)


@cache
def _encoder() -> Encoder:
    return Encoder(ASSETS / "clip-tiny", device="cpu")
