"""The loss on held-out images, or on the training images under other noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from nara_diffusion.training.engines import split_across_processes

from .caches import LatentCache, PromptCache
from .dataset import TrainingSample
from .draws import draw_noise
from .families import Family, placed
from .objectives import Objective, squared_errors


@dataclass(frozen=True)
class ValidationLoss:
    """The unweighted objective at equally spaced noise levels, on the same noise each time."""

    objective: Objective  # with weights of 1
    latents: LatentCache
    samples: Sequence[TrainingSample]  # images to measure on
    family: Family  # with the settings of the run
    seed: int  # of the noise
    points: int  # noise levels
    batch_size: int
    prompts: PromptCache | None = None  # None encodes them by the measured pipeline

    @property
    def indices(self) -> list[int]:
        """The middles of `points` equal parts of the schedule."""
        part = self.objective.levels / self.points
        return [int((i + 0.5) * part) for i in range(self.points)]

    @property
    def noise_levels(self) -> Tensor:
        """λ (points,)."""
        return self.objective.noise_levels[self.indices]

    def curve(self, pipe: DiffusionPipeline, accelerator: Accelerator) -> Tensor:
        """Return the losses (points, samples) of `pipe` on every process.

        The samples are ordered by size.
        """

        def work(points: Sequence[int]) -> list[list[float]]:
            return [self._at(pipe, self.indices[point]) for point in points]

        return torch.tensor(split_across_processes(accelerator, self.points, work))

    @torch.no_grad()
    def _at(self, pipe: DiffusionPipeline, index: int) -> list[float]:
        """Return the loss of each sample at one noise level."""
        name = self.family.denoiser_at(self.objective.timestep[index])
        denoiser = getattr(pipe, name)
        device = denoiser.device
        losses = []
        for batch in self._batches():
            latents = self.latents.mode(batch)
            positions = [sample.position for sample in batch]
            noise = draw_noise(positions, latents.shape[1:], seed=self.seed, role="validation")
            indices = torch.full((len(batch),), index)
            corrupted = self.objective.corrupt(latents.to(device), noise.to(device), indices)
            texts = [sample.prompt for sample in batch]
            states = (
                self.family.encode(pipe, texts)
                if self.prompts is None
                else self.prompts.get(texts, batch)
            )
            embeddings = placed(states, device)
            sources: Any = placed(self.latents.sources(batch), device)
            time_ids = torch.tensor([sample.time_ids for sample in batch], device=device)
            inputs = (corrupted.model_input, corrupted.timestep)
            prediction = self.family.predict(denoiser, *inputs, time_ids, embeddings, sources)
            weights = self.latents.weights(batch, latents)
            losses += squared_errors(prediction, corrupted, weights).tolist()
        return losses

    def _batches(self) -> list[list[TrainingSample]]:
        """Return the samples in batches, each of one size, with sources of one size."""
        by_size: dict[Any, list[TrainingSample]] = {}
        for sample in self.samples:
            by_size.setdefault((sample.target, *sample.source_sizes), []).append(sample)
        batches = []
        for size in sorted(by_size):
            same = by_size[size]
            for start in range(0, len(same), self.batch_size):
                batches.append(same[start : start + self.batch_size])
        return batches
