"""Few-step sampling: the steps of student and teacher, the teacher's latents, the student's loss.

A step of DDIM (arXiv 2010.02502, η = 0), or of Euler's method on a rectified flow, is linear in the
latents z and the prediction y: z' = c z + d y. Solving for y gives the prediction that leads to a
given z'. A trajectory z (K + 1, c, h, w) has the teacher's latents at the start and after each of K
of the student's steps, in which the teacher takes several steps with guidance. From z_k, the
student predicts y_k in one call, without guidance:

    target   a z_k + b z_(k+1),    (a, b) = (−c / d, 1 / d)
    loss     mean over samples of (1 / e_k) · mean (y_k − target)²

e_k is the error of the base model at step k, so that all steps have the same weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from nara_diffusion.noise.timesteps import TimestepNoise
from nara_diffusion.tuner.usage import FewStepSampling
from nara_diffusion.utils.files import atomic_write

from .caches import PromptCache
from .families import placed
from .samples import made_in_batches
from .training_step import DreamBoothLoss

DDIM: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False}
"""The settings of DDIM. Trailing timesteps start at pure noise, and the timesteps of K steps are
among those of any multiple of K steps."""


def student_sampler(scheduler: Any, steps: int, is_flow: bool) -> tuple[Any, FewStepSampling]:
    """Return the deterministic sampler of K steps, and its description for the adapter's file.

    The code of the description is empty if the model's own scheduler is that sampler. By default, the last of K steps
    of Euler's method starts at σ of about 0.001 and changes nothing. With `shift_terminal` it
    starts at 1/K, shifted as the scheduler shifts every σ.
    """
    kind: Any = DDIMScheduler
    options = DDIM
    if is_flow:
        shift = float(scheduler.config.get("shift", 1.0))
        kind, options = FlowMatchEulerDiscreteScheduler, {}
        if steps > 1:
            options = {"shift_terminal": shift / (steps - 1 + shift)}
    sampler = kind.from_config(scheduler.config, **options)
    settings = "".join(f", {name}={value!r}" for name, value in options.items())
    line = f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config{settings})"
    sampler.set_timesteps(steps)
    return sampler, FewStepSampling(
        num_inference_steps=steps,
        timesteps=sampler.timesteps.tolist(),
        scheduler=line if options else "",
        timestep_spacing=sampler.config.get("timestep_spacing"),
        shift_terminal=sampler.config.get("shift_terminal"),
    )


def teacher_sampler(sampler: Any, steps: int, parts: int) -> tuple[Any, dict[str, Any]]:
    """Return the sampler that takes `parts` steps for each of K, and more arguments of its call."""
    if isinstance(sampler, DDIMScheduler):
        return sampler, {}
    sampler.set_timesteps(steps)
    places = np.arange(steps * parts) / parts
    sigmas = np.interp(places, range(steps + 1), sampler.sigmas)
    unshifted = type(sampler).from_config(sampler.config, shift=1.0, shift_terminal=None)
    return unshifted, {"sigmas": sigmas.tolist()}


def landings(sampler: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Return the timesteps (K,) of K steps, and (a, b) of each step, (K, 2) float32.

    The prediction a z + b z' makes the step lead from z to z'.
    """
    sampler.set_timesteps(steps)
    z, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    ends = [sampler.step(y, timestep, z).prev_sample for timestep in sampler.timesteps]
    c, d = torch.stack(ends).double().T
    return sampler.timesteps, torch.stack([-c / d, 1 / d], dim=1).float()


def sample_latents(
    pipe: Any, prompts: Sequence[str], noise: Tensor, call: Mapping[str, Any]
) -> Tensor:
    """Return the latents (b, steps + 1, c, h, w) of a pipeline's steps, float32 on the CPU.

    Args:
        noise: the latents (b, c, h, w) at the start.
        call: the arguments of the pipeline's call.
    """
    path = [noise.to(pipe.device, pipe.dtype)]

    def keep(pipe: Any, step: int, timestep: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        path.append(state["latents"])
        return state

    call = {**call, "output_type": "latent", "callback_on_step_end": keep}
    pipe(prompt=list(prompts), latents=path[0], **call)
    return torch.stack(path, dim=1).float().cpu()


def make_trajectories(
    sample: Callable[[Sequence[int]], Tensor],
    count: int,
    batch_size: int,
    path: Path,
    accelerator: Accelerator,
) -> Tensor:
    """Return `count` trajectories (n, K + 1, c, h, w), float32 on the CPU.

    If `path` exists, they are read from it. Otherwise all processes share the work of computing
    them, and write them to `path`.

    Args:
        sample: a function that takes indices and returns the trajectories (b, K + 1, c, h, w).
    """
    if not path.is_file():
        trajectories = made_in_batches(sample, count, batch_size, accelerator, "teacher")
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial_path:
                save_file({"trajectories": torch.stack(trajectories)}, partial_path)
        accelerator.wait_for_everyone()
    return load_file(path)["trajectories"]


@dataclass(frozen=True)
class StudentLoss:
    """The loss of the student on trajectories, and its errors there."""

    model: Callable[..., Tensor]  # takes what an `AdaptedDenoiser` takes
    trajectories: Tensor  # (n, K + 1, c, h, w), float32 on the CPU
    prompts: Sequence[str]  # of each trajectory
    timesteps: Tensor  # (K,)
    landings: Tensor  # (K, 2), of `landings`
    base_errors: Tensor  # e (K,)
    source: TimestepNoise  # λ of a timestep
    embeddings: PromptCache
    time_ids: Tensor  # (1, 6), on the device of `model`
    batch_size: int  # of measurements

    def __call__(self, batch: Sequence[Mapping[str, int]]) -> DreamBoothLoss:
        """Return the loss of samples {"trajectory", "position"}; the step is position mod K."""
        numbers = torch.tensor([sample["trajectory"] for sample in batch])
        steps = torch.tensor([sample["position"] for sample in batch]) % len(self.timesteps)
        z, end = self.trajectories[numbers, steps], self.trajectories[numbers, steps + 1]
        a, b = self.landings[steps].T[:, :, None, None, None]
        timestep = self.timesteps[steps]
        there = partial(Tensor.to, device=self.time_ids.device, non_blocking=True)
        prompts = [self.prompts[sample["trajectory"]] for sample in batch]
        embeddings = placed(self.embeddings.get(prompts), self.time_ids.device)
        time_ids = self.time_ids.expand(len(batch), -1)
        prediction = self.model(there(z), there(timestep), time_ids, embeddings=embeddings)
        errors = (prediction.float() - there(a * z + b * end)).square().flatten(1).mean(1)
        losses = errors / there(self.base_errors[steps])
        return DreamBoothLoss(losses.mean(), losses, self.source.noise_level(timestep))

    def split(self, pipe: Any, accelerator: Accelerator) -> tuple[StudentLoss, StudentLoss]:
        """Return the loss on training trajectories, and on a tenth held out, with `base_errors`.

        Args:
            pipe: the pipeline of the base.
        """
        count = max(1, len(self.prompts) // 10)
        held_out = replace(
            self, trajectories=self.trajectories[-count:], prompts=self.prompts[-count:]
        )
        base_errors = held_out.curve(pipe, accelerator).mean(1)
        training = replace(
            self,
            trajectories=self.trajectories[:-count],
            prompts=self.prompts[:-count],
            base_errors=base_errors,
        )
        return training, replace(held_out, base_errors=base_errors)

    @property
    def noise_levels(self) -> Tensor:
        """λ (K,)."""
        return self.source.noise_level(self.timesteps)

    @torch.no_grad()
    def curve(self, pipe: Any, accelerator: Accelerator) -> Tensor:
        """Return the errors (K, n) of `pipe`, shares of the base's, on every process."""
        family, steps = self.embeddings.family, len(self.timesteps)
        denoiser = getattr(pipe, family.denoiser)
        measured = replace(self, model=partial(family.predict, denoiser))

        def make(indices: Sequence[int]) -> list[float]:
            batch = [{"trajectory": i // steps, "position": i} for i in indices]
            return measured(batch).per_sample.tolist()

        errors = made_in_batches(
            make, len(self.prompts) * steps, self.batch_size, accelerator, "errors"
        )
        return torch.tensor(errors).view(-1, steps).T
