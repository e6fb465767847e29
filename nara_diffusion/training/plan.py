"""`--plan`: print the memory and FLOPs of a run, and the cheapest flags that make it fit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any, TypeVar

from nara_flags.training import TrainingArguments

from .adapters import title_of
from .engines import accumulation_steps
from .planned_step import Needs, PlannedStep, dtype_of, measure

Args = TypeVar("Args", bound=TrainingArguments)

GB = 10**9


def show_plan(args: Args, describe: Callable[[Args], PlannedStep]) -> dict[str, Any]:
    """Print the memory and FLOPs of the run of `args`, and return {name: figure}, in bytes.

    No weights are loaded and no files are written. If the run needs more memory than `--plan`
    allows, also print the cheapest change of flags that makes it fit.

    Args:
        describe: a function that returns the step of a run. It is also called with changed
            arguments.
    """
    step = describe(args)
    needs = measure(step, args)
    precision = str(dtype_of(args)).removeprefix("torch.")
    adapted = f"{args.pretrained_model_name_or_path}: {title_of(args)}, {precision}"
    lines = [f"{adapted}, {step.forward} a forward (nothing is loaded)", *_table(args, needs)]
    if args.plan is not None and args.plan < math.inf:
        lines += _fitting(args, describe, needs)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write("\n".join(lines) + "\n")
    return asdict(needs)


def _table(args: TrainingArguments, needs: Needs) -> Iterator[str]:
    """Yield the lines of a plan, with memory in GB."""
    for name, size in needs.parts.items():
        yield f"  {size / GB:20.2f} GB  {name}"
    notes = {
        "weights": f"on the device in a step, of {needs.frozen:,} frozen parameters",
        "adapter": f"{needs.trainable:,} trainable parameters",
        "gradients": "after the backward",
        "optimizer": args.optimizer,
        "activations": "the most in a step, with the gradients that exist by then",
        "caching": "the most before a step: a model alone, or an autoencoder beside the denoiser",
        "peak": "of all tensors; the driver and gaps take 1 to 2 GB more",
    }
    for name, note in notes.items():
        yield f"  {name:<12}{getattr(needs, name) / GB:8.2f} GB  {note}"
    forwards = accumulation_steps(args, int(os.environ.get("WORLD_SIZE", 1)))
    tera = needs.flops / 1e12
    yield f"  FLOPs       {forwards * tera:8.4g} TFLOP an optimizer step: {forwards} x {tera:.4g}"


def _fitting(args: Args, describe: Callable[[Args], PlannedStep], needs: Needs) -> Iterator[str]:
    """Yield a line on whether the run fits into `--plan` GB, and if not, the cheapest flags."""
    limit = (args.plan or 0) * GB
    if needs.peak <= limit:
        yield f"It fits into {args.plan:g} GB."
        return
    least = ""
    for flags, changes in cheaper(args, describe(args).swappable):
        try:
            changed = replace(args, **changes)
            step = describe(changed)
        except ValueError:  # the run would refuse these flags
            continue
        peak = measure(step, changed).peak
        if peak <= limit:
            yield f"It doesn't fit into {args.plan:g} GB. {flags} does: {peak / GB:.1f} GB."
            return
        least = f", even with {flags}: {peak / GB:.1f} GB"
    shorter = "--max_length" if hasattr(args, "max_length") else "--resolution"
    yield f"It doesn't fit into {args.plan:g} GB{least}. Lower {shorter}, or use several GPUs."


def cheaper(args: TrainingArguments, swappable: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (flags, their fields) that need less memory, cheapest first.

    A batch of 1 with more accumulation lowers utilisation. Gradient checkpointing needs a second
    forward. Loading in 4 bits loses precision. Swapped blocks wait for copies. Each costs more than
    all earlier ones together.

    Args:
        swappable: the number of blocks that can be swapped.
    """
    batch: dict[str, int] = {"train_batch_size": 1}
    if args.global_batch_size is None:
        steps = args.train_batch_size * args.gradient_accumulation_steps
        batch["gradient_accumulation_steps"] = steps
    swaps = [{"block_swap": count} for count in (swappable // 2, swappable) if count]
    rounded = [] if args.bits or args.adapter == "full" else [{"load_in_4bit": True}]
    recomputed = [] if args.gradient_checkpointing else [{"gradient_checkpointing": True}]
    smaller = [batch] if args.train_batch_size > 1 else []
    changes = ([{}, *change] for change in (swaps, rounded, recomputed, smaller))
    for swap, bits, checkpointing, size in product(*changes):
        fields = {**size, **checkpointing, **bits, **swap}
        if fields:
            flags = " ".join(f"--{name} {value}" for name, value in fields.items())
            yield flags.replace(" True", ""), fields
