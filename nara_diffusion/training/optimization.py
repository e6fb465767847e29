"""The optimizer, with rates of their own for A and B, the core and text encoders; the schedule; the average.

`--ema_decay` D keeps an exponential moving average s of the trained weights θ, by Diffusers' `EMAModel`:

    s ← s + (1 − d) (θ − s),    d = min(D, n / (9 + n)) in step n + 1, and 0 in the first

so d is at most .917 after 100 steps. A checkpoint has both: θ, to train on from, and s in ema.bin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from nara_diffusion.cores.core_set import HOLDER_NAME
from nara_flags.training import OptimizationArguments, TrainingArguments

from .arguments import optimizer_class

_DEFAULTS: dict[str, dict[str, Any]] = {
    # the schedule sets the learning rate, so Adafactor's own relative rates are off
    "adafactor": {"relative_step": False, "scale_parameter": False},
    "prodigy": {"use_bias_correction": True, "safeguard_warmup": True},
}


def build_optimizer(
    model: nn.Module, args: TrainingArguments, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer over all trainable parameters.

    The groups are "adapter" (learning_rate), "core" (core_learning_rate) and "text_encoder"
    (text_encoder_lr, if the script has this argument). Empty groups are omitted.

    Args:
        fused: True if AdamW should update all parameters in one call; see `may_fuse`.

    Raises:
        ValueError: `core_start_step` is set but there is no core.
    """
    members: dict[str, list[nn.Parameter]] = {"adapter": [], "core": [], "text_encoder": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "core" if is_core_parameter(name) else "adapter"
            group = "text_encoder" if name.startswith("text_encoder") else group
            members[group].append(parameter)
    if not members["core"] and args.core_start_step:
        raise ValueError(
            f"core_start_step is {args.core_start_step}, but adapter {args.adapter} with core_type {args.core_type} "
            "has no core to train. Leave core_start_step at 0."
        )
    rates = {
        "core": args.core_learning_rate,
        "text_encoder": getattr(args, "text_encoder_lr", None),
    }
    groups = [
        {"name": group, "params": parameters, "lr": rates.get(group) or args.learning_rate}
        for group, parameters in members.items()
        if parameters
    ]
    options = {"weight_decay": args.weight_decay, **_DEFAULTS.get(args.optimizer, {})}
    if args.optimizer == "AdamW" and fused:
        options["fused"] = True
    options |= args.optimizer_options
    return optimizer_class(args.optimizer)(groups, **options)


def may_fuse(accelerator: Accelerator) -> bool:
    """Return True if PyTorch's fused AdamW works under this engine.

    The fused AdamW needs a third of the time for the many tensors of an adapter. It doesn't work
    with fp16: if gradients overflow, it skips the step internally. accelerate wouldn't notice, and
    would step the schedule. DeepSpeed has its own optimizer.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return False
    return accelerator.device.type in ("cpu", "cuda") and accelerator.scaler is None


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, args: OptimizationArguments, total_steps: int
) -> LRScheduler:
    """Return the learning-rate schedule over `total_steps`.

    Call its method `step` once per optimizer step, for any number of processes. A value of
    `lr_warmup_steps` below 1 is a share of all steps.
    """
    warmup = args.lr_warmup_steps
    steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=steps, num_training_steps=total_steps
    )


def is_core_parameter(name: str) -> bool:
    """Return True if the parameter `name` of a model belongs to a core."""
    return f"{HOLDER_NAME}." in name


def freeze_core(optimizer: torch.optim.Optimizer) -> None:
    """Delete the gradients of the core, so that a step doesn't change its weights and moments."""
    for group in optimizer.param_groups:
        if group.get("name") == "core":
            for parameter in group["params"]:
                parameter.grad = None


class WeightAverage(NamedTuple):
    """The average of trained weights, in their order and dtype."""

    ema: EMAModel
    weights: list[nn.Parameter]


def average_weights(
    accelerator: Accelerator, model: nn.Module, decay: float | None
) -> WeightAverage | None:
    """Return an average of the trained weights, which checkpoints will have; None without `decay`."""
    if decay is None:
        return None
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    average = WeightAverage(EMAModel(weights, decay), weights)
    accelerator.register_for_checkpointing(average.ema)
    return average


@contextmanager
def averaged(average: WeightAverage | None) -> Iterator[None]:
    """The trained weights are their average inside the context, if there is one."""
    with ExitStack() as undo:
        if average is not None:
            average.ema.store(average.weights)
            undo.callback(average.ema.restore, average.weights)
            average.ema.copy_to(average.weights)
        yield
