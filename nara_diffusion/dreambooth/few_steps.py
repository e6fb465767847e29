"""Few-step sampling: the student's and the teacher's steps, targets and trajectories.

A step of DDIM (arXiv 2010.02502, η = 0), or of Euler's method on a rectified flow, is linear in the
latents z and the prediction y: z' = c z + d y. Solving for y gives the prediction that leads to a
given z'. This is the target of a student that takes the whole step at once:

    y = (z' − c z) / d

A trajectory z (K + 1, c, h, w) of the teacher, the base model sampled with guidance and in many
steps, has the latents at the start and after each of K steps. Its noise and prompt depend only on
(seed, number), so that processes can share the work and trajectories are reproducible.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
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

from nara_diffusion.utils.files import atomic_write

from .families import Family
from .samples import made_in_batches

logger = logging.getLogger(__name__)

FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3")
"""The families that use plain classifier-free guidance and the sampler's own timesteps."""
DDIM: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False}
"""The settings of DDIM. Trailing timesteps start at pure noise, and the timesteps of K steps are
among those of any multiple of K steps."""


def check_family(family: Family) -> None:
    """Raise ValueError for a family that can't be distilled."""
    if family.name not in FAMILIES:
        raise ValueError(
            f"distill_to teaches Stable Diffusion 1, 2, XL and 3, and this model is {family.title}, "
            "which has timesteps or a guidance of its own: leave distill_to out."
        )


def student_sampler(scheduler: Any, steps: int, is_flow: bool) -> tuple[Any, str]:
    """Return the deterministic sampler of K steps, and the code that sets it in a pipeline.

    The code is empty if the model's own scheduler is that sampler. By default, the last of K steps
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
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    line = f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config{given})"
    return sampler, line if options else ""


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
    found = []
    for timestep in sampler.timesteps:
        c, d = sampler.step(y, timestep, z).prev_sample.tolist()
        found.append([-c / d, 1 / d])
    return sampler.timesteps, torch.tensor(found)


# ---------------------------------------------------------------------- trajectories


def sample_latents(
    pipe: Any, prompts: Sequence[str], noise: Tensor, call: Mapping[str, Any]
) -> Tensor:
    """Return the latents (b, steps + 1, c, h, w) of a pipeline's steps, float32 on the CPU.

    Args:
        noise: the latents (b, c, h, w) at the start.
        call: the arguments of the pipeline's call.
    """
    path = [noise.to(pipe.device, pipe.dtype)]

    def keep(pipe: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        path.append(given["latents"])
        return given

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
        started = time.perf_counter()
        made = made_in_batches(sample, count, batch_size, accelerator, "teacher")
        seconds = time.perf_counter() - started
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                save_file({"trajectories": torch.stack(made)}, partial)
            logger.info("%d trajectories took %.0f s and are kept in %s", count, seconds, path)
        accelerator.wait_for_everyone()
    return load_file(path)["trajectories"]


def read_prompts(path: str) -> list[str]:
    """Return the prompts in a text file, one per line. Empty lines are skipped.

    Raises:
        ValueError: the file can't be read as text or has no prompt.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts_file '{path}' can't be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts_file '{path}' has no prompt: write one per line.")
    return prompts
