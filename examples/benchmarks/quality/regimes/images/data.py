"""The pictures of the image regimes: what is learnt from, and what the loss is measured on, which no training sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from nara_diffusion.dreambooth.cache import LatentCache, PromptCache
from nara_diffusion.dreambooth.data.image_records import ImageRecord, records_from_folder
from nara_diffusion.dreambooth.families.pipelines import load_pipeline
from quality.assets import ASSETS
from quality.images import drawn
from quality.images.held_out import BINS, CleanBin, clean_bin, records_of
from quality.images.subjects import BACKBONE, SUBJECTS, check_subject, instance_prompt
from quality.regimes.images.objectives import LEVELS

SUBJECT = "toy"
POSES, PLACES = 150, 15
"""Pictures that a conversion learns from: in other poses, and in each of the ten places."""
FIRST = 1000  # number of the first of them; the held-out ones count from 0


@dataclass(frozen=True)
class RegimeData:
    """Attributes:
    pipe: the frozen base model; runs work on copies of its UNet.
    latents, prompts: caches.
    instances: what is learnt from.
    held_out: what the loss is measured on, one batch a bin of λ.
    """

    pipe: Any
    latents: LatentCache
    prompts: PromptCache
    instances: list[ImageRecord]
    held_out: list[CleanBin]


@cache
def conversion_data(subject: str = SUBJECT) -> RegimeData:
    """Many pictures: what changes is the form of the prediction, not what is drawn."""
    subject_drawn = drawn.SUBJECTS[subject]
    poses = drawn.in_poses(subject_drawn, range(FIRST, FIRST + POSES))
    places = drawn.in_places(subject_drawn, range(FIRST, FIRST + PLACES))
    return RegimeData(*_base(), records_of([*poses, *places]), _held_out(subject))


@cache
def subject_data(subject: str = SUBJECT) -> RegimeData:
    """The five pictures that DreamBooth has of a subject."""
    check_subject(subject)
    records = records_from_folder(ASSETS / SUBJECTS[subject], prompt=instance_prompt(subject), progress=False)
    return RegimeData(*_base(), records, _held_out(subject))


@cache
def base_pipeline() -> Any:
    """sdxl-tiny, in float32; never changed."""
    return load_pipeline(str(ASSETS / BACKBONE), dtype=torch.float32)


@cache
def _base() -> tuple[Any, LatentCache, PromptCache]:
    pipe = base_pipeline()
    prompts = PromptCache(pipe)
    return pipe, LatentCache(pipe.vae), prompts


@cache
def _held_out(subject: str) -> list[CleanBin]:
    _, latents, prompts = _base()
    return [clean_bin(latents, prompts, subject, index, LEVELS) for index in range(BINS)]
