"""What the loss of images is measured on: pictures of a subject that no training sees, with noise of their own.

Each bin of λ has its own, half of them in other poses before other walls, half in the ten places of the backbone's
data. A gain on a picture goes through all of its noise levels, so that many pictures in one bin each show far more of
the mean than few in all ten would, in the same time. It is at low noise that gains differ most between pictures: those
bins have most of them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from nara_diffusion.dreambooth.caches import LatentCache, PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.draws import numpy_generator, seeded_normal
from nara_diffusion.dreambooth.families import SDXL
from nara_diffusion.dreambooth.image_records import ImageFile, ImageRecord, make_records
from nara_diffusion.dreambooth.objectives import Corrupted, Objective, squared_errors
from nara_diffusion.dreambooth.pipelines import load_pipeline
from nara_diffusion.dreambooth.source_images import records_from_folder
from quality.running import ASSETS, MAKERS

sys.path.append(str(MAKERS))

from make_subject import in_places, in_poses
from tiny_drawings.places import PLACES
from tiny_drawings.subjects import SUBJECTS as DRAWN

# ---------------------------------------------------------------------- base and subjects

BACKBONE = "sdxl-tiny"
SUBJECTS = {"toy": "subject", "car": "subject-car", "cup": "subject-cup", "house": "subject-house"}
"""{name, which is that of its kind: folder of its five pictures}."""
IDENTIFIER = "sks"
SIZE = (64, 64)
LEVELS = 1000
"""N of the base's schedule."""


class Base(NamedTuple):
    """The base model, in float32, never changed, and its caches."""

    pipe: Any
    latents: LatentCache
    prompts: PromptCache


@cache
def base() -> Base:
    pipe = load_pipeline(str(ASSETS / BACKBONE), dtype=torch.float32)
    return Base(pipe, LatentCache(pipe.vae), PromptCache(pipe))


def instance_prompt(subject: str) -> str:
    return f"a photo of {IDENTIFIER} {subject}"


def check_subject(subject: str) -> None:
    """Raises ValueError if there is no such subject."""
    if subject not in SUBJECTS:
        raise ValueError(f"subject is {subject!r}, expected one of {', '.join(SUBJECTS)}.")


@cache
def pictures_of(subject: str) -> list[ImageRecord]:
    """The five that DreamBooth has of a subject."""
    check_subject(subject)
    return records_from_folder(ASSETS / SUBJECTS[subject], prompt=instance_prompt(subject), progress=False)


# ---------------------------------------------------------------------- held out

BINS = 10
EACH_PLACE = (4, 4, 4, 2, 2, 2, 1, 1, 1, 1)
"""Pictures in each of the ten places, of each bin; there are as many poses."""


@dataclass(frozen=True)
class Shown:
    """What a denoiser is shown at once, such as the pictures of a bin at timesteps of that bin, on fixed noise.

    Attributes:
        batch: of b samples.
        indices: (b,), noise levels of [0, N).
        time_ids: (b, 6).
        embeddings: (b, l, d) and (b, p).
    """

    batch: Corrupted
    indices: Tensor
    time_ids: Tensor
    embeddings: tuple[Tensor, Tensor]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Of a denoiser: x_λ (b, c, h, w), timesteps (b,), and what goes with them."""
        return self.batch.model_input, self.batch.timestep, self.time_ids, self.embeddings

    def rows(self, chosen: slice) -> Shown:
        """Some of its pictures."""
        batch = Corrupted(**{name: tensor[chosen] for name, tensor in vars(self.batch).items()})
        hidden, pooled = self.embeddings
        return Shown(batch, self.indices[chosen], self.time_ids[chosen], (hidden[chosen], pooled[chosen]))


@torch.no_grad()
def held_out_losses(unet: Any, held_out: Shown) -> Tensor:
    """The mean squared error (b,) of each picture, of `unet` with whatever adapter and λ it has now."""
    return squared_errors(SDXL.predict(unet, *held_out.inputs), held_out.batch)


@dataclass(frozen=True)
class CleanBin:
    """The pictures of a bin before their noise is added, the same for all methods, seeds and objectives.

    Attributes:
        clean, noise: (b, c, h, w).
        indices, time_ids, embeddings: as `Shown` has them; noise levels are spread over the bin.
    """

    clean: Tensor
    noise: Tensor
    indices: Tensor
    time_ids: Tensor
    embeddings: tuple[Tensor, Tensor]

    def corrupted(self, objective: Objective) -> Shown:
        """As `objective` shows them to a denoiser."""
        batch = objective.corrupt(self.clean, self.noise, self.indices)
        return Shown(batch, self.indices, self.time_ids, self.embeddings)


@cache
def clean_bins(subject: str) -> list[CleanBin]:
    """One a bin of λ."""
    return [_clean_bin(subject, index) for index in range(BINS)]


def _clean_bin(subject: str, index: int) -> CleanBin:
    first = sum(EACH_PLACE[:index])
    numbers, count = range(first, first + EACH_PLACE[index]), len(PLACES)
    places = in_places(DRAWN[subject], numbers)
    poses = in_poses(DRAWN[subject], range(count * numbers.start, count * numbers.stop))
    samples = DreamBoothDataset(records_of([*poses, *places]), [SIZE], batch_size=1, seed=0).plain_samples()
    clean = base().latents.mode(samples)  # (b, c, h, w)
    noise = seeded_normal(clean.shape[1:], seed=0, stream=f"held-out noise {index}", indices=range(len(samples)))
    return CleanBin(
        clean,
        noise,
        torch.tensor(bin_timesteps(index, len(samples))),
        torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
        base().prompts.get([sample.prompt for sample in samples]),
    )


def places_of(subject: str) -> dict[str, Image]:
    """{caption: the subject drawn in that place}, of each place that the backbone's data has."""
    return dict(in_places(DRAWN[subject], range(1)))


def bin_centres() -> list[float]:
    """λ in the middle of each bin."""
    return [(index + 0.5) / BINS for index in range(BINS)]


def bin_timesteps(index: int, count: int) -> list[int]:
    """`count` timesteps of [0, N), equally spaced over the bin, in an order that is always the same."""
    order = numpy_generator(0, "held-out timesteps", index).permutation(count)
    return [int((index + (place + 0.5) / count) * LEVELS / BINS) for place in order]


def records_of(pictures: Sequence[tuple[str, Image]]) -> list[ImageRecord]:
    """Of (caption, picture)."""
    files: list[ImageFile] = []
    for number, (caption, image) in enumerate(pictures):
        file = io.BytesIO()
        image.save(file, format="PNG")
        files.append((f"drawn picture {number}", partial(bytes, file.getvalue()), caption))
    return make_records(files, progress=False)
