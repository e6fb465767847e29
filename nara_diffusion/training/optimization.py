"""AdamW with one learning rate for A and B and one for the core, and its schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler

CORE_MARK = "nara_core."


def build_optimizer(model: nn.Module, args: Any) -> torch.optim.AdamW:
    """AdamW over what is trainable, in groups "adapter" (learning_rate) and "core" (core_learning_rate), if not empty.

    Raises:
        ValueError: nothing in `model` is trainable, or `core_start_step` is set and there is no core.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("nothing in the model is trainable: add an adapter before the optimizer is built.")
    core = [parameter for name, parameter in trainable if CORE_MARK in name]
    if args.core_start_step and not core:
        raise ValueError(
            f"core_start_step is {args.core_start_step}, but core_type {args.core_type!r} has no core to train."
        )
    core_rate = args.learning_rate if args.core_learning_rate is None else args.core_learning_rate
    groups = [
        {"name": "adapter", "params": [parameter for name, parameter in trainable if CORE_MARK not in name]},
        {"name": "core", "params": core, "lr": core_rate},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, args: Any, total_steps: int) -> LRScheduler:
    """The schedule over `total_steps` optimizer steps; step it once a step, whatever the number of processes."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup_steps(args.lr_warmup_steps, total_steps),
        num_training_steps=total_steps,
    )


def check_scheduler(name: str) -> None:
    """Refuses a name that transformers doesn't know, before anything is loaded."""
    known = [member.value for member in SchedulerType]
    if name not in known:
        raise ValueError(f"lr_scheduler is {name!r}, expected one of {', '.join(known)}.")


def warmup_steps(value: float, total_steps: int) -> int:
    """`--lr_warmup_steps` in steps: below 1 it is a share of all steps."""
    return round(value * total_steps) if value < 1 else int(value)


def hold_core(optimizer: Any) -> None:
    """Drops the core's gradients, so that this step leaves its weights and its Adam moments untouched."""
    for group in optimizer.param_groups:
        if group.get("name") == "core":
            for parameter in group["params"]:
                parameter.grad = None
