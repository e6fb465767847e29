"""The loss and the measurements of a student that samples in K steps.

From the teacher's latents z_k, the student predicts y_k in one call, without guidance. The target
is the prediction that leads to z_(k+1) (`few_steps.landings`):

    loss = mean over samples of (1 / e_k) · mean (prediction − y_k)²

e_k is the error of the base model at step k, so that all steps have the same weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nara_diffusion.noise.timesteps import TimestepNoise

from .caches import PromptCache
from .families import placed
from .few_steps import FewSteps
from .samples import made_in_batches
from .training_step import DreamBoothLoss
from .trajectories import sample_latents


@dataclass(frozen=True)
class StudentLoss:
    """The loss of the student on trajectories, and its errors there."""

    model: Callable[..., Tensor]  # takes what an `AdaptedDenoiser` takes
    trajectories: Tensor  # (n, K + 1, c, h, w), float32 on the CPU
    prompts: Sequence[str]  # of each trajectory
    few_steps: FewSteps  # K of them
    base_errors: Tensor  # e (K,)
    source: TimestepNoise  # λ of a timestep
    embeddings: PromptCache
    time_ids: Tensor  # (1, 6), on the device of `model`
    batch_size: int  # of measurements

    def __call__(self, batch: Sequence[Mapping[str, int]]) -> DreamBoothLoss:
        """Return the loss of samples {"trajectory", "position"}; the step is position mod K."""
        numbers = torch.tensor([sample["trajectory"] for sample in batch])
        timesteps = self.few_steps.timesteps
        steps = torch.tensor([sample["position"] for sample in batch]) % len(timesteps)
        z, end = self.trajectories[numbers, steps], self.trajectories[numbers, steps + 1]
        a, b = self.few_steps.landings[steps].T[:, :, None, None, None]
        timestep = timesteps[steps]
        there = partial(Tensor.to, device=self.time_ids.device, non_blocking=True)
        prompts = [self.prompts[sample["trajectory"]] for sample in batch]
        embeddings = placed(self.embeddings.get(prompts), self.time_ids.device)
        time_ids = self.time_ids.expand(len(batch), -1)
        prediction = self.model(there(z), there(timestep), time_ids, embeddings=embeddings)
        errors = (prediction.float() - there(a * z + b * end)).square().flatten(1).mean(1)
        losses = errors / there(self.base_errors[steps])
        return DreamBoothLoss(losses.mean(), losses, self.source.noise_level(timestep))

    @property
    def noise_levels(self) -> Tensor:
        """λ (K,)."""
        return self.source.noise_level(self.few_steps.timesteps)

    @torch.no_grad()
    def curve(self, pipe: Any, accelerator: Accelerator) -> Tensor:
        """Return the errors (K, n) of `pipe`, shares of the base's, on every process."""
        family, steps = self.embeddings.family, len(self.few_steps.timesteps)
        denoiser = getattr(pipe, family.denoiser)
        measured = replace(self, model=partial(family.predict, denoiser))

        def make(indices: Sequence[int]) -> list[float]:
            batch = [{"trajectory": i // steps, "position": i} for i in indices]
            return measured(batch).per_sample.tolist()

        count = len(self.prompts) * steps
        errors = made_in_batches(make, count, self.batch_size, accelerator, "errors")
        return torch.tensor(errors).view(-1, steps).T

    def end_error(self, pipe: Any, call: Mapping[str, Any], accelerator: Accelerator) -> float:
        """Return the mean squared distance between the final latents and those of the teacher.

        Args:
            call: the arguments of the pipeline's call.
        """

        def make(indices: Sequence[int]) -> list[float]:
            paths, prompts = self.trajectories[indices], [self.prompts[i] for i in indices]
            ends = sample_latents(pipe, prompts, paths[:, 0], call)[:, -1]
            return (ends - paths[:, -1]).square().flatten(1).mean(1).tolist()

        count = len(self.prompts)
        return fmean(made_in_batches(make, count, self.batch_size, accelerator, "ends"))
