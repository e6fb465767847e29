"""Trajectories of a teacher, the base model sampled with guidance and in many steps.

A trajectory z (K + 1, c, h, w) has the latents at the levels of K steps, from noise to the end. The
teacher takes several steps from one of these levels to the next. The noise and prompt of trajectory
i depend only on (seed, i), so that processes can share the work and trajectories are reproducible.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.training.loop import ShuffledStream
from nara_diffusion.utils.files import atomic_write

from .draws import seeded_normal
from .families import Embeddings, Family, Placed, placed
from .few_steps import Level, advance

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """The denoiser of a pipeline with classifier-free guidance."""

    pipe: Any
    family: Family  # with the settings of the run
    guidance_scale: float  # at 1 or less, there is no guidance and one call per step
    resolution: int  # pixels
    batch_size: int

    @property
    def device(self) -> torch.device:
        return getattr(self.pipe, self.family.denoiser).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents."""
        denoiser = getattr(self.pipe, self.family.denoiser)
        side = self.resolution // self.pipe.vae_scale_factor
        return denoiser.config.in_channels, side, side

    def time_ids(self, count: int) -> Tensor:
        """Return the time ids (count, 6) of whole images, which aren't cropped."""
        side = self.resolution
        return torch.tensor([[side, side, 0, 0, side, side]] * count, device=self.device)

    def embeddings(self, prompts: Sequence[str]) -> Embeddings:
        """Return the embeddings of the prompts, with guidance after those of empty prompts."""
        given = self.family.encode(self.pipe, prompts)
        if self.guidance_scale <= 1:
            return given
        empty = self.family.encode(self.pipe, [""] * len(prompts))
        if self.pipe.config.get("force_zeros_for_empty_prompt"):  # as SDXL's pipeline does
            empty = tuple(torch.zeros_like(part) for part in empty)
        return tuple(torch.cat(parts) for parts in zip(empty, given, strict=True))

    def predict(self, z: Tensor, level: Level, embeddings: Placed) -> Tensor:
        """Return the guided prediction (b, c, h, w) float32 at z of one level."""
        copies = 2 if self.guidance_scale > 1 else 1
        sample = torch.cat([z] * copies)
        timestep = torch.full((len(sample),), level.timestep, device=self.device)
        if not self.family.is_flow:
            timestep = timestep.long()
        denoiser, ids = getattr(self.pipe, self.family.denoiser), self.time_ids(len(sample))
        found = self.family.predict(denoiser, sample, timestep, ids, embeddings).float()
        if copies == 1:
            return found
        without, given = found.chunk(2)
        return without + self.guidance_scale * (given - without)

    @torch.no_grad()
    def sample(self, z: Tensor, prompts: Sequence[str], levels: Sequence[Level]) -> list[Tensor]:
        """Return the latents at all levels, from the noise z (b, c, h, w) at the first of them."""
        embeddings = placed(self.embeddings(prompts), self.device)
        path = [z.to(self.device)]
        for here, there in itertools.pairwise(levels):
            y = self.predict(path[-1], here, embeddings)
            path.append(advance(path[-1], y, here, there))
        return path


def make_trajectories(
    teacher: Teacher,
    prompts: Sequence[str],
    levels: Sequence[Level],
    parts: int,
    seed: int,
    path: Path,
    accelerator: Accelerator,
) -> Tensor:
    """Return the trajectories (n, K + 1, c, h, w) of n prompts, float32 on the CPU.

    If `path` exists, they are read from it. Otherwise all processes share the work of computing
    them, and write them to `path`.

    Args:
        levels: the teacher's K · parts + 1 levels. Every `parts`-th level is kept.
        seed: the seed of the noise at the first level.
    """
    accelerator.wait_for_everyone()
    is_made = path.is_file()
    accelerator.wait_for_everyone()
    if not is_made:
        _make(teacher, prompts, levels, parts, seed, path, accelerator)
    return load_file(path)["trajectories"]


def _make(
    teacher: Teacher,
    prompts: Sequence[str],
    levels: Sequence[Level],
    parts: int,
    seed: int,
    path: Path,
    accelerator: Accelerator,
) -> None:
    started, is_main = time.perf_counter(), accelerator.is_main_process

    def work(indices: Sequence[int]) -> list[Tensor]:
        made: list[Tensor] = []
        starts = range(0, len(indices), teacher.batch_size)
        for start in tqdm(starts, desc="teacher", unit="batch", disable=not is_main):
            batch = indices[start : start + teacher.batch_size]
            noise = seeded_normal(teacher.shape, seed=seed, stream="trajectory", indices=batch)
            kept = teacher.sample(noise, [prompts[i] for i in batch], levels)[::parts]
            made += torch.stack(kept, dim=1).cpu().unbind()
        return made

    found = split_across_processes(accelerator, len(prompts), work)
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            save_file({"trajectories": torch.stack(found)}, partial)
        seconds = time.perf_counter() - started
        logger.info(
            "%d trajectories of the teacher, %d steps each, took %.0f s; they are kept in %s",
            len(prompts),
            len(levels) - 1,
            seconds,
            path,
        )
    accelerator.wait_for_everyone()


class Segments(Dataset):
    """The training data: position p is step p mod K of a trajectory. The order is shuffled."""

    def __init__(self, trajectories: int, steps: int, seed: int) -> None:
        samples = [{"trajectory": number} for number in range(trajectories)]
        self.stream, self.steps = ShuffledStream(samples, seed), steps

    def __getitem__(self, position: int) -> dict[str, int]:
        return {**self.stream[position], "step": position % self.steps}


def collate_segments(samples: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Return {"trajectory": b indices, "step": b indices} as lists, which stay on the host."""
    names = ("trajectory", "step")
    return {name: [sample[name] for sample in samples] for name in names}


def read_prompts(path: str) -> list[str]:
    """Return the prompts in a text file, one per line. Empty lines are skipped.

    Raises:
        ValueError: the file can't be read as text or has no prompt.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts_file '{path}' can't be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts_file '{path}' has no prompt: write one per line.")
    return prompts
