"""One forward of training: a batch of samples → latents → noise → the denoiser's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nara_diffusion.training.arguments import window_of

from .cache import LatentCache, PromptCache
from .dataset import TrainingSample
from .draws import draw_indices, draw_noise, drawable_levels
from .family import Family
from .objectives import Corrupted, Objective, build_objective, squared_errors


class DreamBoothLoss(NamedTuple):
    """A `StepLoss` of b samples."""

    loss: Tensor  # the scalar to differentiate, the mean of `per_sample`
    per_sample: Tensor  # (b,), with the weighted loss of each sample's class image added, if there are any
    noise_level: Tensor  # (b,), λ of the instance images


@dataclass(frozen=True)
class TrainingStep:
    """`step(batch)` is the loss of a batch that `collate_samples` made."""

    model: nn.Module  # an `AdaptedDenoiser`, as accelerate wrapped it
    objective: Objective
    latents: LatentCache
    prompts: PromptCache | None  # None where text encoders are trained
    device: torch.device  # where `model` runs
    seed: int  # of noise levels, noise and posterior samples
    group_size: int = 1  # samples of an optimizer step
    stratified: bool = False  # spread the noise levels of each optimizer step evenly
    noise_offset: float = 0.0  # κ of `draw_noise`
    prior_loss_weight: float = 1.0
    drawable: Tensor | None = None  # the noise levels to draw from, (k,) of `drawable_levels`; None: all

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


def training_step(
    args: Any, pipe: Any, family: Family, scheduler: Any, device: torch.device, group_size: int
) -> TrainingStep:
    """The loss of a run, of the denoiser of `pipe`, as a model that is sampled by `scheduler`."""
    scheme = args.weighting_scheme
    objective = build_objective(scheduler, snr_gamma=args.snr_gamma, shift=args.flow_shift, weighting_scheme=scheme)
    density = {name: getattr(args, name) for name in ("logit_mean", "logit_std", "mode_scale")}
    return TrainingStep(
        model=getattr(pipe, family.denoiser),
        objective=objective,
        latents=LatentCache(pipe.vae),
        prompts=None if args.train_text_encoder else PromptCache(pipe, family),
        device=device,
        seed=args.seed,
        group_size=group_size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
        prior_loss_weight=args.prior_loss_weight,
        drawable=drawable_levels(objective.noise_levels, window_of(args), scheme, **density),
    )
