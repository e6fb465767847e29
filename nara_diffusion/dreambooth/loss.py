"""One forward of training: a batch of samples → latents → noise → the denoiser's error.

Where the base is held outside of a window of λ, the loss of an image that was drawn there is

    W · mean (f(x_λ, λ) − f₀(x_λ, λ))²

f what the denoiser returns with its adapters and f₀ without, over all (c, h, w). Neither min-SNR's weights nor EDM's
enter it, nor another `Distance`, so that the base is held as firmly at every λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.dreambooth.cache import LatentCache, PromptCache
from nara_diffusion.dreambooth.data.dataset import TrainingSample
from nara_diffusion.noise.window import EVERYTHING, NoiseWindow
from nara_diffusion.training.base_hold import SplitLosses, as_base, rows_for_base

from .objectives import Corrupted, Objective, weighted_errors, with_prior
from .objectives.density import UNIFORM, TimestepDensity
from .objectives.distances import SQUARED, Distance
from .objectives.timestep_bias import NO_BIAS, TimestepBias
from .objectives.timesteps import WindowedSchedule, draw_indices, draw_noise


@dataclass(frozen=True)
class DreamBoothLoss:
    """A `StepLoss` of b samples.

    Attributes:
        loss: the scalar to differentiate, the mean of `per_sample`.
        per_sample: (b,), with the weighted loss of each sample's class image added, if there are any.
        noise_level: (b,), λ of the instance images.
        split: of all images, those of the class too, and without their weight; None unless the base is held.
    """

    loss: Tensor
    per_sample: Tensor
    noise_level: Tensor
    split: SplitLosses | None = None


@dataclass(frozen=True)
class TrainingStep:
    """`step(batch)` is the loss of a batch that `collate_samples` made.

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
        window: of λ; class images are drawn from it as well.
        bias: which noise levels are drawn more often than others, for class images as well.
        density: the same of a rectified flow; the bias multiplies it.
        distance: what errors count; the base is held by squares whatever it is.
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
    window: NoiseWindow = EVERYTHING
    distance: Distance = SQUARED
    bias: TimestepBias = NO_BIAS
    density: TimestepDensity = UNIFORM

    @cached_property
    def windowed(self) -> WindowedSchedule:
        """The noise levels to draw from."""
        return windowed_schedule(self.objective, self.window, self.bias, self.density)

    def __call__(self, batch: Mapping[str, Any]) -> DreamBoothLoss:
        corrupted = self._corrupt(batch["samples"])
        levels = self.objective.source.noise_level(corrupted.timestep)
        weight = self.window.hold_weight
        if weight is None:
            losses, split = weighted_errors(self._predict(corrupted, batch), corrupted, self.distance), None
        else:
            split = self._split(corrupted, batch, levels)
            losses = split.weighted(weight)
        if batch["samples"][-1].role == "class":
            losses, levels = with_prior(losses, self.prior_loss_weight), levels.chunk(2)[0]
        return DreamBoothLoss(losses.mean(), losses, levels, split)

    def _split(self, corrupted: Corrupted, batch: Mapping[str, Any], levels: Tensor) -> SplitLosses:
        """Return the error of each image, or its distance to the base where λ (b,) lies outside of the window."""
        held = self.window.held(levels)
        rows = rows_for_base(held)
        with as_base(self.model):
            base = self._predict(corrupted, batch, rows)
        prediction = self._predict(corrupted, batch)
        errors = weighted_errors(prediction, corrupted, self.distance)
        distances = (prediction[rows].float() - base.float()).square().flatten(1).mean(1)  # (k,)
        return SplitLosses(torch.where(held, errors.index_put((rows,), distances), errors), levels, held)

    def _predict(self, corrupted: Corrupted, batch: Mapping[str, Any], rows: Tensor | None = None) -> Tensor:
        """Return the prediction of the model as it is for some `rows` (k,) of the batch, or for all, (k, c, h, w)."""
        rows = torch.arange(len(batch["samples"]), device=self.device) if rows is None else rows
        inputs = (corrupted.model_input[rows], corrupted.timestep[rows], batch["time_ids"].to(self.device)[rows])
        prompts = [batch["prompts"][row] for row in rows.tolist()]
        if self.prompts is None:
            return self.model(*inputs, prompts=prompts)
        return self.model(*inputs, embeddings=tuple(tensor.to(self.device) for tensor in self.prompts.get(prompts)))

    def _corrupt(self, samples: Sequence[TrainingSample]) -> Corrupted:
        """Draws of one role have consecutive rows: all instances, then all class images."""
        latents = self.latents.sample(samples, seed=self.seed)  # (b, c, h, w)
        indices, noise = [], []
        for role in dict.fromkeys(sample.role for sample in samples):
            positions = [sample.position for sample in samples if sample.role == role]
            options: dict[str, Any] = {"seed": self.seed, "role": role}
            levels = {"levels": self.objective.levels, "stratified": self.stratified, "group_size": self.group_size}
            indices.append(draw_indices(positions, windowed=self.windowed, **levels, **options))
            noise.append(draw_noise(positions, latents.shape[1:], offset=self.noise_offset, **options))
        return self.objective.corrupt(
            latents.to(self.device), torch.cat(noise).to(self.device), torch.cat(indices).to(self.device)
        )


def windowed_schedule(
    objective: Objective, window: NoiseWindow, bias: TimestepBias = NO_BIAS, density: TimestepDensity = UNIFORM
) -> WindowedSchedule:
    """The objective's noise levels in `window`, drawn by `bias` times `density`.

    Raises:
        ValueError: there are none, or the bias chooses none or all of them.
    """
    nothing = torch.zeros(objective.levels, 1, 1, 1)
    timestep = objective.corrupt(nothing, nothing, torch.arange(objective.levels)).timestep
    each = [density.weights(objective.levels), bias.weights(objective.levels)]
    given = [weights for weights in each if weights is not None]
    weights = torch.stack(given).prod(0) if given else None
    return WindowedSchedule(objective.source.noise_level(timestep), window, weights)
