"""The optimizer and its schedule, with learning rates for A and B, the core, and text encoders.

Also what spares memory: gradient checkpointing.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from nara_diffusion.cores.core import HOLDER_NAME

from .arguments import OptimizationArguments, TrainingArguments, is_unpaged, optimizer_class

TEXT_ENCODER_MARK = "text_encoder"  # the prefix of a parameter's name
_DEFAULTS: dict[str, dict[str, Any]] = {
    # the schedule sets the rate, so Adafactor's own relative rates are off
    "adafactor": {"relative_step": False, "scale_parameter": False},
    "prodigy": {"use_bias_correction": True, "safeguard_warmup": True},
}

logger = logging.getLogger(__name__)


def build_optimizer(
    model: nn.Module, args: TrainingArguments, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer over all trainable parameters.

    Its groups are "adapter" (learning_rate), "core" (core_learning_rate) and "text_encoder"
    (text_encoder_lr, if the script has it); empty groups are left out.

    Args:
        fused: whether AdamW updates all parameters in one call; see `may_fuse`.

    Raises:
        ValueError: nothing in `model` is trainable; or `core_start_step` is set and there is no
            core.
    """
    groups = _parameter_groups(model, args)
    options = {
        "weight_decay": args.weight_decay,
        **_DEFAULTS.get(args.optimizer, {}),
        **args.optimizer_options,
    }
    options = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    if is_unpaged(args.optimizer):
        logger.warning(
            "PagedAdamW moves its states between the memory of GPU and CPU, and there is no GPU: as AdamW"
        )
    if args.optimizer == "AdamW" and fused:
        options.setdefault("fused", True)
    if args.optimizer == "prodigy":
        options["lr"] = args.learning_rate  # it allows only one rate for all groups
    return optimizer_class(args.optimizer)(groups, **options)


def may_fuse(accelerator: Accelerator) -> bool:
    """Return True if AdamW may be PyTorch's fused one under this engine.

    The fused one takes a third of the time for an adapter's many tensors. It doesn't work with
    fp16: it skips the steps that overflow itself, but accelerate recognises a skipped step by a
    missing call and would step the schedule. DeepSpeed has its own optimizer.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return False
    return accelerator.device.type in ("cpu", "cuda") and accelerator.scaler is None


def _parameter_groups(model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]]:
    rates = {
        "adapter": args.learning_rate,
        "core": args.core_learning_rate or args.learning_rate,
        "text_encoder": getattr(args, "text_encoder_lr", None) or args.learning_rate,
    }
    members: dict[str, list[nn.Parameter]] = {group: [] for group in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "core" if is_core_parameter(name) else "adapter"
            group = "text_encoder" if name.startswith(TEXT_ENCODER_MARK) else group
            members[group].append(parameter)
    if not any(members.values()):
        raise ValueError(
            "nothing in the model is trainable: add an adapter before the optimizer is built."
        )
    if not members["core"] and args.core_start_step:
        raise ValueError(
            f"core_start_step is {args.core_start_step}, but adapter {args.adapter} with core_type {args.core_type} "
            "has no core to train: leave it at 0."
        )
    return [
        {"name": group, "params": members[group], "lr": rate}
        for group, rate in rates.items()
        if members[group]
    ]


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, args: OptimizationArguments, total_steps: int
) -> LRScheduler:
    """Return the schedule over `total_steps`. Call `step` once a step, on any number of processes.

    `lr_warmup_steps` below 1 is a share of all steps.
    """
    warmup = args.lr_warmup_steps
    steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=steps, num_training_steps=total_steps
    )


def is_core_parameter(name: str) -> bool:
    """Return True if `name`, a parameter of a model, belongs to a core."""
    return f"{HOLDER_NAME}." in name


def freeze_core(optimizer: Any) -> None:
    """Delete the core's gradients, so that a step leaves its weights and Adam moments unchanged."""
    for group in optimizer.param_groups:
        if group.get("name") == "core":
            for parameter in group["params"]:
                parameter.grad = None


def recompute_activations(model: PreTrainedModel) -> None:
    """Turn on the model's gradient checkpointing, in the form without gradient at the inputs."""
    # the name up to transformers 5.23, deprecated since then
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
