"""One forward of training: a batch of samples → latents → noise → the denoiser's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cache import LatentCache, PromptCache
from .dataset import TrainingSample
from .draws import draw_indices, draw_noise
from .objectives import Corrupted, Objective, squared_errors


@dataclass(frozen=True)
class DreamBoothLoss:
    """A `StepLoss` of b samples.

    Attributes:
        loss: the scalar to differentiate, the mean of `per_sample`.
        per_sample: (b,), with the weighted loss of each sample's class image added, if there are any.
        noise_level: (b,), λ of the instance images.
    """

    loss: Tensor
    per_sample: Tensor
    noise_level: Tensor


@dataclass(frozen=True)
class TrainingStep:
    """`step(batch)` is the loss of a batch that `collate_samples` made.

    Attributes:
        model: an `AdaptedDenoiser`, as accelerate wrapped it.
        objective: what is learnt.
        latents: the cache of the images' latents.
        prompts: the cache of embeddings of frozen text encoders; None where they are trained.
        device: where `model` runs.
        seed: of noise levels, noise and posterior samples.
        group_size: samples of an optimizer step, for `stratified`.
        stratified: spread the noise levels of each optimizer step evenly.
        noise_offset: κ, see `draw_noise`.
        prior_loss_weight: what class images count.
        drawable: the noise levels to draw from, of class images too, (k,) of `drawable_levels`; None draws from all.
    """

    model: nn.Module
    objective: Objective
    latents: LatentCache
    prompts: PromptCache | None
    device: torch.device
    seed: int
    group_size: int = 1
    stratified: bool = False
    noise_offset: float = 0.0
    prior_loss_weight: float = 1.0
    drawable: Tensor | None = None

    def __call__(self, batch: Mapping[str, Any]) -> DreamBoothLoss:
        samples = batch["samples"]
        corrupted = self._corrupt(samples)
        losses = squared_errors(self._predict(corrupted, batch), corrupted)
        levels = self.objective.source.noise_level(corrupted.timestep)
        if samples[-1].role == "class":  # each loss has its own sample's min-SNR weight
            instance, prior = losses.chunk(2)
            losses, levels = instance + self.prior_loss_weight * prior, levels.chunk(2)[0]
        return DreamBoothLoss(losses.mean(), losses, levels)

    def _predict(self, corrupted: Corrupted, batch: Mapping[str, Any]) -> Tensor:
        """The prediction (b, c, h, w) of the model as it is."""
        inputs = (corrupted.model_input, corrupted.timestep, batch["time_ids"].to(self.device))
        if self.prompts is None:
            return self.model(*inputs, prompts=batch["prompts"])
        embeddings = tuple(part.to(self.device) for part in self.prompts.get(batch["prompts"]))
        return self.model(*inputs, embeddings=embeddings)

    def _corrupt(self, samples: Sequence[TrainingSample]) -> Corrupted:
        """Draws of one role have consecutive rows: all instances, then all class images."""
        latents = self.latents.sample(samples, seed=self.seed)  # (b, c, h, w)
        levels = torch.arange(self.objective.levels) if self.drawable is None else self.drawable
        indices, noise = [], []
        for role in dict.fromkeys(sample.role for sample in samples):
            positions = [sample.position for sample in samples if sample.role == role]
            spread: dict[str, Any] = {"stratified": self.stratified, "group_size": self.group_size}
            indices.append(draw_indices(positions, levels, seed=self.seed, role=role, **spread))
            noise.append(draw_noise(positions, latents.shape[1:], seed=self.seed, offset=self.noise_offset, role=role))
        return self.objective.corrupt(latents.to(self.device), torch.cat(noise).to(self.device), torch.cat(indices))
