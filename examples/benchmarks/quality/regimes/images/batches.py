"""The batch of a training step: a function of the seed and the step's number, not of the method.

All methods of a seed meet the same pictures in the same order, at the same noise levels, under the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.dreambooth import collate_samples
from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.draws import draw_indices, draw_noise
from nara_diffusion.dreambooth.objectives import Corrupted, Objective
from quality.images.controls import shuffled_noise_levels
from quality.images.subjects import SIZE
from quality.regimes.images.data import RegimeData

Inputs = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]
"""x_λ (b, c, h, w), timesteps (b,), time ids (b, 6), embeddings (b, l, d) and (b, p)."""


@dataclass(frozen=True)
class Batch:
    """Attributes:
    corrupted: of b samples.
    time_ids: (b, 6).
    embeddings: (b, l, d) and (b, p).
    shuffled: λ (b,) of other samples, for the ablation of that name.
    """

    corrupted: Corrupted
    time_ids: Tensor
    embeddings: tuple[Tensor, Tensor]
    shuffled: Tensor

    @property
    def inputs(self) -> Inputs:
        """Of a denoiser."""
        return self.corrupted.model_input, self.corrupted.timestep, self.time_ids, self.embeddings


def batches(data: RegimeData, objective: Objective, args: Any) -> Callable[[int], Batch]:
    """The batch of step number n.

    Args:
        args: of train_scripts/dreambooth_sdxl.py; `seed` and `train_batch_size` are read.
    """
    size, seed = args.train_batch_size, args.seed
    dataset = DreamBoothDataset(data.instances, [SIZE], batch_size=size, seed=seed)

    def batch(number: int) -> Batch:
        positions = range(number * size, (number + 1) * size)
        samples = collate_samples([dataset[position] for position in positions])
        latents = data.latents.sample(samples["samples"], seed=seed)  # (b, c, h, w)
        levels = torch.arange(objective.levels)
        indices = draw_indices(positions, levels, seed=seed, stratified=True, group_size=size)
        noise = draw_noise(positions, latents.shape[1:], seed=seed)
        return Batch(
            objective.corrupt(latents, noise, indices),
            samples["time_ids"],
            data.prompts.get(samples["prompts"]),
            shuffled_noise_levels(positions, seed, objective.levels, size),
        )

    return batch
