"""What the loss of images is measured on: pictures of a subject that no training sees, with noise of their own.

Each bin of λ has its own, half of them in other poses before other walls, half in the ten places of the backbone's
data. A gain on a picture goes through all of its noise levels, so that many pictures in one bin each show far more of
the mean than few in all ten would, in the same time. It is at low noise that gains differ most between pictures: those
bins have most of them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from nara_diffusion.dreambooth.dataset import DreamBoothDataset, numpy_generator, seeded_normal
from nara_diffusion.dreambooth.families import SDXL
from nara_diffusion.dreambooth.image_records import ImageRecord, make_records
from nara_diffusion.dreambooth.objectives import Corrupted, Objective, build_objective, squared_errors
from nara_diffusion.dreambooth.training_step import LatentCache, PromptCache
from quality.images import drawn

# ---------------------------------------------------------------------- subjects

BACKBONE = "sdxl-tiny"
SUBJECTS = {"toy": "subject", "car": "subject-car", "cup": "subject-cup", "house": "subject-house"}
"""{name, which is that of its kind: folder of its five pictures}."""
IDENTIFIER = "sks"
SIZE = (64, 64)


def instance_prompt(subject: str) -> str:
    return f"a photo of {IDENTIFIER} {subject}"


def check_subject(subject: str) -> None:
    """Raises ValueError if there is no such subject."""
    if subject not in SUBJECTS:
        raise ValueError(f"subject is {subject!r}, expected one of {', '.join(SUBJECTS)}.")


# ---------------------------------------------------------------------- held out

BINS = 10
EACH_PLACE = (4, 4, 4, 2, 2, 2, 1, 1, 1, 1)
"""Pictures in each of the ten places, of each bin; there are as many poses."""


@dataclass(frozen=True)
class HeldOut:
    """A forward of the validation loss: the pictures of a bin at timesteps of that bin, on fixed noise.

    Attributes:
        batch: of b samples.
        time_ids: (b, 6).
        embeddings: (b, l, d) and (b, p).
    """

    batch: Corrupted
    time_ids: Tensor
    embeddings: tuple[Tensor, Tensor]

    def rows(self, chosen: slice) -> HeldOut:
        """Some of its pictures."""
        batch = Corrupted(**{name: tensor[chosen] for name, tensor in vars(self.batch).items()})
        hidden, pooled = self.embeddings
        return HeldOut(batch, self.time_ids[chosen], (hidden[chosen], pooled[chosen]))


def held_out_losses(unet: Any, held_out: HeldOut) -> list[float]:
    """The mean squared error of each picture."""
    return squared_errors(predicted(unet, held_out), held_out.batch).tolist()


@torch.no_grad()
def predicted(unet: Any, held_out: HeldOut) -> Tensor:
    """What `unet` says of each picture, (b, c, h, w)."""
    batch = held_out.batch
    return SDXL.predict(unet, batch.model_input, batch.timestep, held_out.time_ids, held_out.embeddings)


@dataclass(frozen=True)
class CleanBin:
    """The pictures of a bin before their noise is added, the same for all methods, seeds and objectives.

    Attributes:
        clean, noise: (b, c, h, w).
        indices: (b,), noise levels of [0, N), spread over the bin.
        time_ids, embeddings: as `HeldOut` has them.
    """

    clean: Tensor
    noise: Tensor
    indices: Tensor
    time_ids: Tensor
    embeddings: tuple[Tensor, Tensor]

    def corrupted(self, objective: Objective) -> HeldOut:
        """As `objective` shows them to a denoiser."""
        batch = objective.corrupt(self.clean, self.noise, self.indices)
        return HeldOut(batch, self.time_ids, self.embeddings)


def held_out_bin(pipe: Any, latents: LatentCache, prompts: PromptCache, subject: str, index: int) -> HeldOut:
    """The pictures of a bin under the objective that the scheduler of `pipe` has."""
    objective = build_objective(pipe.scheduler)
    return clean_bin(latents, prompts, subject, index, objective.levels).corrupted(objective)


def clean_bin(latents: LatentCache, prompts: PromptCache, subject: str, index: int, levels: int) -> CleanBin:
    """The pictures of a bin of [0, `levels`)."""
    first = sum(EACH_PLACE[:index])
    numbers, count = range(first, first + EACH_PLACE[index]), len(drawn.PLACES)
    places = drawn.in_places(drawn.SUBJECTS[subject], numbers)
    poses = drawn.in_poses(drawn.SUBJECTS[subject], range(count * numbers.start, count * numbers.stop))
    samples = DreamBoothDataset(records_of([*poses, *places]), [SIZE], batch_size=1, seed=0).plain_samples()
    clean = latents.mode(samples)  # (b, c, h, w)
    noise = seeded_normal(clean.shape[1:], seed=0, stream=f"held-out noise {index}", indices=range(len(samples)))
    return CleanBin(
        clean,
        noise,
        torch.tensor(bin_timesteps(index, len(samples), levels)),
        torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
        prompts.get([sample.prompt for sample in samples]),
    )


def places_of(subject: str) -> dict[str, Image]:
    """{caption: the subject drawn in that place}, of each place that the backbone's data has."""
    return dict(drawn.in_places(drawn.SUBJECTS[subject], range(1)))


def bin_centres() -> list[float]:
    """λ in the middle of each bin."""
    return [(index + 0.5) / BINS for index in range(BINS)]


def bin_timesteps(index: int, count: int, levels: int) -> list[int]:
    """`count` timesteps of [0, `levels`), equally spaced over the bin, in an order that is always the same."""
    order = numpy_generator(0, "held-out timesteps", index).permutation(count)
    return [int((index + (place + 0.5) / count) * levels / BINS) for place in order]


def records_of(pictures: Sequence[tuple[str, Image]]) -> list[ImageRecord]:
    """Of (caption, picture)."""
    sources = [_source(f"drawn picture {number}", image) for number, (_, image) in enumerate(pictures)]
    return make_records(sources, [caption for caption, _ in pictures], progress=False)


def _source(name: str, image: Image) -> tuple[str, partial[bytes]]:
    """`image` as a PNG in memory."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return name, partial(bytes, file.getvalue())
