"""The loss on held-out images, or on the training images under other noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from nara_diffusion.training.engines import split_across_processes

from .caches import PromptCache
from .dataset import TrainingSample, collate_samples
from .draws import draw_noise
from .families import Family
from .training_step import TrainingStep


@dataclass(frozen=True)
class ValidationLoss:
    """The unweighted objective at equally spaced noise levels, on the same noise each time."""

    step: TrainingStep  # of the run, with weights of 1
    samples: Sequence[TrainingSample]  # images to measure on
    family: Family  # with the settings of the run
    points: int  # noise levels
    batch_size: int

    @property
    def indices(self) -> list[int]:
        """The middles of `points` equal parts of the schedule."""
        part = self.step.objective.levels / self.points
        return [int((i + 0.5) * part) for i in range(self.points)]

    @property
    def noise_levels(self) -> Tensor:
        """λ (points,)."""
        return self.step.objective.noise_levels[self.indices]

    def curve(self, pipe: DiffusionPipeline, accelerator: Accelerator) -> Tensor:
        """Return the losses (points, samples) of `pipe` on every process.

        The samples are ordered by size.
        """
        prompts = self.step.prompts or PromptCache(pipe, self.family)  # of trained text encoders

        def work(points: Sequence[int]) -> list[list[float]]:
            return [self._at(pipe, prompts, self.indices[point]) for point in points]

        return torch.tensor(split_across_processes(accelerator, self.points, work))

    @torch.no_grad()
    def _at(self, pipe: DiffusionPipeline, prompts: PromptCache, index: int) -> list[float]:
        """Return the loss of each sample at one noise level."""
        objective, device, seed = self.step.objective, self.step.device, self.step.seed
        denoiser = getattr(pipe, self.family.denoiser_at(objective.timestep[index]))
        predict = partial(self.family.predict, denoiser)
        measured = replace(self.step, model=predict, prompts=prompts)
        losses = []
        for samples in self._batches():
            latents = self.step.latents.mode(samples)
            positions = [sample.position for sample in samples]
            noise = draw_noise(positions, latents.shape[1:], seed=seed, role="validation")
            indices = torch.full((len(samples),), index)
            corrupted = objective.corrupt(latents.to(device), noise.to(device), indices)
            batch = collate_samples([{"samples": [sample]} for sample in samples])
            losses += measured.losses(batch, corrupted).tolist()
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
