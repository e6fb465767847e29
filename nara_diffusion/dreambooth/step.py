"""One forward of training: a batch of draws → latents → noise → the denoiser's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.denoisers import TimestepNoise
from nara_diffusion.dreambooth.dataset import Draw
from nara_diffusion.dreambooth.latents import LatentCache
from nara_diffusion.dreambooth.objectives import Corrupted, Objective, squared_errors, with_prior
from nara_diffusion.dreambooth.prompts import PromptCache
from nara_diffusion.dreambooth.timesteps import draw_indices, draw_noise

_MEANINGS = {"timestep": "discrete", "flow": "sigma_1000", "edm": "edm"}


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
    """`step(batch)` is the loss of a batch that `collate_draws` made.

    Attributes:
        model: an `AdaptedDenoiser`, as accelerate wrapped it.
        objective: what is learnt.
        latents: of the images.
        prompts: embeddings of frozen text encoders; None where they are trained.
        device: where `model` runs.
        seed: of noise levels, noise and posterior samples.
        group_size: samples of an optimizer step, for `stratified`.
        stratified: spread the noise levels of each optimizer step evenly.
        noise_offset: κ, see `draw_noise`.
        prior_loss_weight: what class images count.
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

    def __call__(self, batch: Mapping[str, Any]) -> DreamBoothLoss:
        corrupted = self._corrupt(batch["draws"], batch.get("pixel_values"))
        inputs = (corrupted.model_input, corrupted.timestep, batch["time_ids"].to(self.device))
        if self.prompts is None:
            prediction = self.model(*inputs, prompts=batch["prompts"])
        else:
            embeddings = tuple(tensor.to(self.device) for tensor in self.prompts.get(batch["prompts"]))
            prediction = self.model(*inputs, embeddings=embeddings)
        losses = squared_errors(prediction, corrupted)
        levels = noise_levels(self.objective, corrupted.timestep)
        if batch["draws"][-1].role == "class":
            losses, levels = with_prior(losses, self.prior_loss_weight), levels.chunk(2)[0]
        return DreamBoothLoss(losses.mean(), losses, levels)

    def _corrupt(self, draws: Sequence[Draw], pixel_values: Tensor | None) -> Corrupted:
        """Draws of one role have consecutive rows: all instances, then all class images."""
        latents = self.latents.sample(draws, seed=self.seed, pixel_values=pixel_values)  # (b, c, h, w)
        indices, noise = [], []
        for role in dict.fromkeys(draw.role for draw in draws):
            positions = [draw.position for draw in draws if draw.role == role]
            options: dict[str, Any] = {"seed": self.seed, "role": role}
            levels = {"levels": self.objective.levels, "stratified": self.stratified, "group_size": self.group_size}
            indices.append(draw_indices(positions, **levels, **options))
            noise.append(draw_noise(positions, latents.shape[1:], offset=self.noise_offset, **options))
        return self.objective.corrupt(
            latents.to(self.device), torch.cat(noise).to(self.device), torch.cat(indices).to(self.device)
        )


def noise_levels(objective: Objective, timestep: Tensor) -> Tensor:
    """λ (b,) as an adapter reads it from the denoiser's timestep (b,)."""
    return TimestepNoise(_MEANINGS[objective.convention]).noise_level(timestep)
