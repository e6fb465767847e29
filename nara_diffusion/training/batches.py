"""The number of forwards in an optimizer step, as the arguments say it; another setting elsewhere raises."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator


def accumulation_steps(args: Any, processes: int) -> int:
    """Forwards of one process that make an optimizer step: --gradient_accumulation_steps, or what --global_batch_size
    leaves to each of `processes`.

    Raises:
        ValueError: the global batch can't be divided evenly among processes and forwards.
    """
    if args.global_batch_size is None:
        return args.gradient_accumulation_steps
    together = args.train_batch_size * processes
    steps, rest = divmod(args.global_batch_size, together)
    if rest:
        raise ValueError(
            f"global_batch_size {args.global_batch_size} isn't a multiple of the {together} samples of one forward "
            f"(train_batch_size {args.train_batch_size}, {processes} processes): launch another number of processes "
            f"(--num_processes), or change one of the two."
        )
    return steps


def check_accumulation(accelerator: Accelerator, steps: int) -> None:
    """Refuse an engine that accumulates otherwise than the arguments say: its steps would be of other batches, and
    more or fewer than the schedule has.

    Raises:
        ValueError: accelerate's configuration, or DeepSpeed's, names another number than `steps`.
    """
    found = accelerator.gradient_accumulation_steps
    if found != steps:
        raise ValueError(
            f"accelerate's configuration (or ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or DeepSpeed's) says "
            f"gradient_accumulation_steps {found}, and the arguments {steps}: make them equal, as by "
            f"accelerate launch --gradient_accumulation_steps {steps}."
        )
