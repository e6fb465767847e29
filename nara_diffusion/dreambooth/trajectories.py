"""Trajectories of a teacher, the base model sampled with guidance and in many steps.

A trajectory z (K + 1, c, h, w) has the latents at the start and after each of K steps. Its noise
and prompt depend only on (seed, number), so that processes can share the work and trajectories are
reproducible.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from nara_diffusion.utils.files import atomic_write

from .samples import made_in_batches

logger = logging.getLogger(__name__)


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
        started = time.perf_counter()
        trajectories = made_in_batches(sample, count, batch_size, accelerator, "teacher")
        seconds = time.perf_counter() - started
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                save_file({"trajectories": torch.stack(trajectories)}, partial)
            logger.info("%d trajectories took %.0f s and are stored in %s", count, seconds, path)
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
        raise ValueError(
            f"--prompts_file {path} can't be read ({error}): name a text file."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {path} contains no prompts: write one per line.")
    return prompts
