"""One subject of the image benchmark: its pictures, prompts and judge, all that its runs share, made once a process.

The base model, latents of the five training pictures, embeddings of prompts, and the held-out pictures as noisy latents
depend neither on the method nor on the seed, so that a run costs its steps, its samples, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.denoiser import predict
from nara_diffusion.dreambooth.encoders import Encoder
from nara_diffusion.dreambooth.latents import LatentCache
from nara_diffusion.dreambooth.measurement import Judge
from nara_diffusion.dreambooth.objectives import Corrupted, build_objective, squared_errors
from nara_diffusion.dreambooth.pipelines import load_pipeline
from nara_diffusion.dreambooth.prompts import PromptCache
from nara_diffusion.dreambooth.records import ImageRecord, records_from_folder
from nara_diffusion.dreambooth.seeding import numpy_generator, seeded_normal

ASSETS = Path(__file__).parents[2] / "assets"
BACKBONE = "sdxl-tiny"
SUBJECTS = {"toy": "subject", "car": "subject-car", "cup": "subject-cup", "house": "subject-house"}
PLACES = ("on the beach", "in the snow", "in the city", "in the forest", "in the desert", "at night", "on the grass")
IDENTIFIER = "sks"
SIZE = (64, 64)
BINS = 10
PAIRS = 1  # (ε, −ε) of each held-out picture and bin


@dataclass(frozen=True)
class HeldOut:
    """A forward of the validation loss: held-out pictures at timesteps of one bin, on fixed noise.

    Attributes:
        batch: of b samples, the two of a pair with noise ε and −ε after each other.
        time_ids: (b, 6).
        embeddings: (b, l, d) and (b, p).
    """

    batch: Corrupted
    time_ids: Tensor
    embeddings: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageTask:
    """Attributes:
    subject: its name, which is that of its kind.
    pipe: the frozen base model; runs work on copies of its UNet.
    latents, prompts: caches.
    instances: the five training pictures.
    held_out: one batch a bin of λ.
    base_losses: of the backbone as it is, (bins, pictures).
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
    judge: Judge
    in_places: dict[str, Image]

    @property
    def instance_prompt(self) -> str:
        return instance_prompt(self.subject)

    @property
    def sample_prompts(self) -> list[str]:
        """The instance prompt, and the subject in each of `PLACES`."""
        return [self.instance_prompt, *(f"{self.instance_prompt} {place}" for place in PLACES)]


@torch.no_grad()
def held_out_losses(unet: Any, held_out: HeldOut) -> list[float]:
    """The mean squared error of each held-out picture, over its noises."""
    batch = held_out.batch
    prediction = predict(unet, batch.model_input, batch.timestep, held_out.time_ids, held_out.embeddings)
    return squared_errors(prediction, batch).view(-1, 2 * PAIRS).mean(1).tolist()


def instance_prompt(subject: str) -> str:
    return f"a photo of {IDENTIFIER} {subject}"


def check_subject(subject: str) -> None:
    """Raises ValueError if there is no such subject."""
    if subject not in SUBJECTS:
        raise ValueError(f"subject is {subject!r}, expected one of {', '.join(SUBJECTS)}.")


@cache
def load_task(subject: str) -> ImageTask:
    """Everything that runs on `subject` share.

    Raises:
        ValueError: there is no such subject.
    """
    check_subject(subject)
    pipe, judge = _base_model(), _encoder()
    latents = LatentCache(pipe.vae)
    prompts = PromptCache([pipe.tokenizer, pipe.tokenizer_2], [pipe.text_encoder, pipe.text_encoder_2])
    instances = records_from_folder(ASSETS / SUBJECTS[subject], prompt=instance_prompt(subject), progress=False)
    unseen = records_from_folder(ASSETS / "subject-held-out" / subject, progress=False)
    held_out = [_held_out(pipe, latents, prompts, unseen, bin_index) for bin_index in range(BINS)]
    return ImageTask(
        subject,
        pipe,
        latents,
        prompts,
        instances,
        held_out,
        [held_out_losses(pipe.unet, batch) for batch in held_out],
        Judge([record.source.load() for record in instances], judge, judge, [IDENTIFIER]),
        {record.prompt: record.source.load() for record in unseen if record.prompt != instance_prompt(subject)},
    )


def bin_centres() -> list[float]:
    """λ in the middle of each bin."""
    return [(index + 0.5) / BINS for index in range(BINS)]


def bin_timesteps(bin_index: int, count: int, levels: int) -> list[int]:
    """`count` timesteps of [0, `levels`), equally spaced over the bin, in an order that is always the same."""
    order = numpy_generator(0, "held-out timesteps", bin_index).permutation(count)
    return [int((bin_index + (place + 0.5) / count) * levels / BINS) for place in order]


@cache
def _base_model() -> Any:
    return load_pipeline(str(ASSETS / BACKBONE), dtype=torch.float32)


@cache
def _encoder() -> Encoder:
    return Encoder(ASSETS / "clip-tiny", device="cpu", progress=False)


def _held_out(
    pipe: Any, latents: LatentCache, prompts: PromptCache, records: Sequence[ImageRecord], bin_index: int
) -> HeldOut:
    """The same for all methods and seeds: timesteps spread over the bin, noise in antithetic pairs.

    The error of ε and that of −ε deviate from their mean in opposite directions to first order.
    """
    draws = [
        draw
        for draw in DreamBoothDataset(records, [SIZE], batch_size=1, seed=0).plain_draws()
        for _ in range(2 * PAIRS)
    ]
    clean = latents.mode(draws)  # (b, c, h, w)
    halves = seeded_normal(
        clean.shape[1:], seed=0, stream=f"held-out noise {bin_index}", indices=range(len(draws) // 2)
    )
    noise = torch.stack([halves, -halves], dim=1).flatten(0, 1)  # (b, c, h, w): ε₀, −ε₀, ε₁, …
    objective = build_objective(pipe.scheduler)
    timesteps = bin_timesteps(bin_index, len(draws) // 2, objective.levels)
    batch = objective.corrupt(clean, noise, torch.tensor(timesteps).repeat_interleave(2))
    return HeldOut(
        batch,
        torch.tensor([draw.crop.time_ids for draw in draws], dtype=torch.float32),
        prompts.get([draw.prompt for draw in draws]),
    )
