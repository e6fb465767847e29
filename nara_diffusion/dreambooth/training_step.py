"""One forward of training: a batch of samples → latents → noise → the denoiser's error.

The latents come from `caches`, the noise levels and the noise from `draws`, and the error from
`objectives`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from nara_diffusion.training.arguments import window_of

from .caches import LatentCache, PromptCache
from .dataset import TrainingSample
from .draws import draw_indices, draw_noise, drawable_levels
from .families import Family, placed
from .image_arguments import DreamBoothArguments
from .objectives import Corrupted, Objective, build_objective, squared_errors


class DreamBoothLoss(NamedTuple):
    """A `StepLoss` of b samples."""

    loss: Tensor  # the scalar to differentiate, the mean of `per_sample`
    per_sample: Tensor  # (b,), each with the weighted loss of its class image, if there is one
    noise_level: Tensor  # (b,), λ of the instance images


@dataclass(frozen=True)
class TrainingStep:
    """The loss of training: `step(batch)`, for a batch from `collate_samples`."""

    model: nn.Module  # an `AdaptedDenoiser`, as accelerate wrapped it
    objective: Objective
    latents: LatentCache
    prompts: PromptCache | None  # None if text encoders are trained
    device: torch.device  # where `model` runs
    seed: int  # of noise levels, noise and posterior samples
    group_size: int = 1  # samples of an optimizer step
    stratified: bool = False  # spread the noise levels of each optimizer step evenly
    noise_offset: float = 0.0  # κ of `draw_noise`
    prior_loss_weight: float = 1.0
    drawable: Tensor | None = None  # the noise levels to draw from, (k,) of `drawable_levels`

    def __call__(self, batch: Mapping[str, Any]) -> DreamBoothLoss:
        samples = batch["samples"]
        corrupted = self._corrupt(samples)
        time_ids = batch["time_ids"].to(self.device, non_blocking=True)
        inputs = (corrupted.model_input, corrupted.timestep, time_ids)
        if self.prompts is None:
            prediction = self.model(*inputs, prompts=batch["prompts"])
        else:
            embeddings = placed(self.prompts.get(batch["prompts"], samples), self.device)
            sources = placed(self.latents.sources(samples), self.device)
            prediction = self.model(*inputs, embeddings=embeddings, sources=sources)
        weights = self.latents.weights(samples, corrupted.target)
        losses = squared_errors(prediction, corrupted, weights)
        levels = self.objective.source.noise_level(corrupted.timestep)
        if samples[-1].role == "class":  # each loss has the min-SNR weight of its own sample
            instance, prior = losses.chunk(2)
            losses = instance + self.prior_loss_weight * prior
            levels, _ = levels.chunk(2)
        return DreamBoothLoss(losses.mean(), losses, levels)

    def _corrupt(self, samples: Sequence[TrainingSample]) -> Corrupted:
        """Return the samples' corrupted latents, with drawn noise levels and noise.

        All rows of a role are consecutive: first all instances, then all class images.
        """
        latents = self.latents.sample(samples, seed=self.seed)  # (b, c, h, w)
        drawable = self.drawable
        if drawable is None:
            drawable = torch.arange(self.objective.levels)
        indices, noise = [], []
        for role in dict.fromkeys(sample.role for sample in samples):
            positions = [sample.position for sample in samples if sample.role == role]
            index = draw_indices(
                positions,
                drawable,
                seed=self.seed,
                stratified=self.stratified,
                group_size=self.group_size,
                role=role,
            )
            indices.append(index)
            shape, offset = latents.shape[1:], self.noise_offset
            noise.append(draw_noise(positions, shape, seed=self.seed, offset=offset, role=role))
        drawn = torch.cat(noise).to(self.device, non_blocking=True)
        latents = latents.to(self.device, non_blocking=True)
        return self.objective.corrupt(latents, drawn, torch.cat(indices))


def training_step(
    args: DreamBoothArguments,
    pipe: DiffusionPipeline,
    family: Family,
    device: torch.device,
    group_size: int,
) -> TrainingStep:
    """Return the loss of a run, for the prediction type of the scheduler of `pipe`."""
    objective = build_objective(
        pipe.scheduler,
        snr_gamma=args.snr_gamma,
        shift=args.flow_shift,
        weighting_scheme=args.weighting_scheme,
    )
    drawable = drawable_levels(
        objective.noise_levels,
        window_of(args),
        args.weighting_scheme,
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        mode_scale=args.mode_scale,
    )
    return TrainingStep(
        model=getattr(pipe, family.denoiser),
        objective=objective,
        latents=LatentCache(
            pipe.vae,
            mask_floor=args.mask_floor,
            source_pixels=family.pixels_of_sources(pipe),
        ),
        prompts=None if args.train_text_encoder else PromptCache(pipe, family),
        device=device,
        seed=args.seed,
        group_size=group_size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
        prior_loss_weight=args.prior_loss_weight,
        drawable=drawable,
    )
