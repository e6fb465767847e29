"""One forward of training: a batch of samples → latents → noise → the denoiser's error.

The latents come from `caches`, the noise levels and the noise from `draws`, and the error from
`objectives`. The validation loss is that of held-out images, or of the training images under other
noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from nara_diffusion.noise.level import stratified_uniform
from nara_diffusion.training.arguments import window_of
from nara_diffusion.training.engines import split_across_processes

from .caches import LatentCache, PromptCache
from .dataset import TrainingSample, collate_samples
from .draws import draw_indices, draw_noise, drawable_levels, numpy_generator
from .families import HIGH, Family, placed
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

    model: Callable[..., Tensor]  # an `AdaptedDenoiser`, as accelerate wrapped it
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
    experts: Mapping[str, Tensor] | None = None  # of two denoisers: the levels of each
    forward_size: int = 1  # samples of a forward, over all processes

    def __call__(self, batch: Mapping[str, Any]) -> DreamBoothLoss:
        samples, options = batch["samples"], {}
        drawable, group_size = self.drawable, self.group_size
        if self.experts is not None:
            options["expert"] = self.expert_of(samples[0].position)
            drawable, group_size = self.experts[options["expert"]], self.forward_size
        corrupted = self._corrupt(samples, drawable, group_size)
        losses = self.losses(batch, corrupted, **options)
        levels = self.objective.source.noise_level(corrupted.timestep)
        if samples[-1].role == "class":  # each loss has the min-SNR weight of its own sample
            instance, prior = losses.chunk(2)
            losses = instance + self.prior_loss_weight * prior
            levels, _ = levels.chunk(2)
        return DreamBoothLoss(losses.mean(), losses, levels)

    def expert_of(self, position: int) -> str:
        """Return the name of the denoiser for the forward that has the sample at `position`.

        All processes get the same one. A denoiser with k of Σ k levels is drawn with probability
        k / Σ k, so that each level is drawn as often as with one denoiser.
        """
        assert self.experts is not None
        u = stratified_uniform(
            [position // self.forward_size],
            self.group_size // self.forward_size if self.stratified else 1,
            shift=partial(numpy_generator, self.seed, "expert shift"),
            value=partial(numpy_generator, self.seed, "expert"),
        )
        ends = np.cumsum([len(levels) for levels in self.experts.values()])
        number = np.searchsorted(ends, u.item() * ends[-1], side="right")
        return list(self.experts)[number]

    def losses(self, batch: Mapping[str, Any], corrupted: Corrupted, **options: Any) -> Tensor:
        """Return the weighted error (b,) of the model's prediction for each sample of a batch.

        Args:
            options: further arguments of the model.
        """
        samples, prompts = batch["samples"], batch["prompts"]
        time_ids = batch["time_ids"].to(self.device, non_blocking=True)
        if self.prompts is None:
            options["prompts"] = prompts
        else:
            options["embeddings"] = placed(self.prompts.get(prompts, samples), self.device)
        options["sources"] = placed(self.latents.sources(samples), self.device)
        prediction = self.model(corrupted.model_input, corrupted.timestep, time_ids, **options)
        weights = self.latents.weights(samples, corrupted.target)
        return squared_errors(prediction, corrupted, weights)

    def _corrupt(
        self, samples: Sequence[TrainingSample], drawable: Tensor | None, group_size: int
    ) -> Corrupted:
        """Return the samples' corrupted latents, with drawn noise levels and noise.

        All rows of a role are consecutive: first all instances, then all class images.
        """
        latents = self.latents.sample(samples, seed=self.seed)  # (b, c, h, w)
        if drawable is None:
            drawable = torch.arange(self.objective.levels)
        positions: dict[str, list[int]] = {}
        for sample in samples:
            positions.setdefault(sample.role, []).append(sample.position)
        draw_index = partial(
            draw_indices,
            levels=drawable,
            seed=self.seed,
            stratified=self.stratified,
            group_size=group_size,
        )
        draw = partial(
            draw_noise, shape=latents.shape[1:], seed=self.seed, offset=self.noise_offset
        )
        indices = [draw_index(places, role=role) for role, places in positions.items()]
        noise = [draw(places, role=role) for role, places in positions.items()]
        latents = latents.to(self.device, non_blocking=True)
        drawn = torch.cat(noise).to(self.device, non_blocking=True)
        return self.objective.corrupt(latents, drawn, torch.cat(indices))


def training_step(
    args: DreamBoothArguments,
    pipe: DiffusionPipeline,
    family: Family,
    device: torch.device,
    group_size: int,
    forward_size: int,
) -> TrainingStep:
    """Return the loss of a run, for the prediction type of the scheduler of `pipe`.

    Args:
        group_size: the number of samples in an optimizer step.
        forward_size: the number of samples in a forward, over all processes.
    """
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
    experts = None
    if family.boundary is not None:
        experts = expert_levels(family, drawable, objective.timestep)
    return TrainingStep(
        model=getattr(pipe, family.denoiser),
        objective=objective,
        latents=LatentCache(
            pipe.vae,
            mask_floor=args.mask_floor,
            source_pixels=family.source_pixels and partial(family.source_pixels, pipe),
        ),
        prompts=None if args.train_text_encoder else PromptCache(pipe, family),
        device=device,
        seed=args.seed,
        group_size=group_size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
        prior_loss_weight=args.prior_loss_weight,
        drawable=drawable,
        experts=experts,
        forward_size=forward_size,
    )


def expert_levels(family: Family, drawable: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
    """Return {trained denoiser: its part of the levels `drawable`}.

    Raises:
        ValueError: a denoiser has no level in the run's window.
    """
    assert family.boundary is not None
    is_high = timesteps[drawable] >= family.boundary
    levels = {name: drawable[is_high == (name == HIGH)] for name in family.trained}
    for name in family.trained:
        if len(levels[name]) == 0:
            raise ValueError(
                f"{name} has no noise level between --min_noise_level and --max_noise_level: widen the window, or "
                f"give --expert {'low' if name == HIGH else 'high'}."
            )
    return levels


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
        return [
            by_size[size][start : start + self.batch_size]
            for size in sorted(by_size)
            for start in range(0, len(by_size[size]), self.batch_size)
        ]
