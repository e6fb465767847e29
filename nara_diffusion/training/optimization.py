"""The optimizer and its schedule, with separate learning rates for A and B, the core, and text encoders."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Adafactor, get_scheduler

from nara_diffusion.cores.registry import BUILT_IN
from nara_diffusion.training.adapters.methods import effective, method_of

CORE_MARK = "nara_core."
TEXT_ENCODER_MARK = "text_encoder"  # what a parameter's name starts with
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""The schedules of transformers that depend on step and arguments only; others need a metric or more settings."""

logger = logging.getLogger(__name__)


def build_optimizer(
    model: nn.Module, args: Any, global_batch: int | None = None, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over what is trainable, in groups "adapter" (learning_rate), "core" (core_learning_rate) and
    "text_encoder" (text_encoder_lr and adam_weight_decay_text_encoder, of a script that has them), those of them that
    aren't empty.

    Args:
        global_batch: samples of an optimizer step; --scale_lr needs it.
        fused: whether AdamW updates all parameters in one call; `Run.fuses_optimizer` says where that is right.

    Raises:
        ValueError: `scale_lr` without `global_batch`; nothing in `model` is trainable; `core_start_step` is set and
            there is no core; the optimizer's package isn't installed; or Prodigy, which has one rate, is given several.
    """
    groups = _parameter_groups(model, args)
    if args.scale_lr:
        if global_batch is None:
            raise ValueError("scale_lr multiplies the learning rates by the samples of a step: pass global_batch.")
        groups = [{**group, "lr": group["lr"] * global_batch} for group in groups]
    options: dict[str, Any] = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    if args.optimizer == "prodigy":
        return _prodigy(groups, args, options)
    if args.optimizer == "adafactor":
        # the schedule sets the rate, so that Adafactor's own, relative to step and weights, is off
        fixed: dict[str, Any] = {"relative_step": False, "scale_parameter": False}
        return Adafactor(groups, weight_decay=args.weight_decay, **fixed)
    if args.use_8bit_adam:
        return _package("bitsandbytes", "use_8bit_adam").optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=fused or None)  # None lets PyTorch choose among the others


def _parameter_groups(model: nn.Module, args: Any) -> list[dict[str, Any]]:
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("nothing in the model is trainable: add an adapter before the optimizer is built.")
    rates = {
        "adapter": args.learning_rate,
        "core": args.core_learning_rate or args.learning_rate,
        "text_encoder": getattr(args, "text_encoder_lr", None) or args.learning_rate,
    }
    members: dict[str, list[nn.Parameter]] = {group: [] for group in rates}
    for name, parameter in trainable:
        members[_group_of(name)].append(parameter)
    core_type = effective(args, "core_type")
    if args.core_start_step and not members["core"]:
        what = f"core_type {core_type!r}" if method_of(args).family == "nara" else f"adapter {args.adapter!r}"
        raise ValueError(f"core_start_step is {args.core_start_step}, but {what} has no core to train: leave it at 0.")
    if args.core_learning_rate is not None and not members["core"] and core_type not in BUILT_IN:
        # for built-in types of core, `check_method` has raised already
        logger.warning("core_learning_rate isn't read: core_type %r trains nothing", core_type)
    groups = [{"name": group, "params": members[group], "lr": rate} for group, rate in rates.items() if members[group]]
    decay = getattr(args, "adam_weight_decay_text_encoder", None)
    return [
        group | {"weight_decay": decay} if group["name"] == "text_encoder" and decay is not None else group
        for group in groups
    ]


def _group_of(name: str) -> str:
    if name.startswith(TEXT_ENCODER_MARK):
        return "text_encoder"
    return "core" if CORE_MARK in name else "adapter"


def _prodigy(groups: list[dict[str, Any]], args: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    if len({group["lr"] for group in groups}) > 1:
        given = ", ".join(f"{group['name']} {group['lr']:g}" for group in groups)
        raise ValueError(f"prodigy has one learning rate for all, got {given}: give learning_rate alone.")
    if groups[0]["lr"] < 0.1:
        logger.warning("prodigy multiplies the rate that it finds by learning_rate %g: 1 is usual", groups[0]["lr"])
    return _package("prodigyopt", "optimizer prodigy").Prodigy(
        groups,
        lr=groups[0]["lr"],
        beta3=args.prodigy_beta3,
        decouple=args.prodigy_decouple,
        use_bias_correction=args.prodigy_use_bias_correction,
        safeguard_warmup=args.prodigy_safeguard_warmup,
        **options,
    )


def _package(name: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{needed_by} needs the package {name}, which can't be imported ({error}): pip install {name}."
        ) from error


def build_scheduler(optimizer: torch.optim.Optimizer, args: Any, total_steps: int) -> LRScheduler:
    """The schedule over `total_steps` optimizer steps. Call its `step` once a step, on any number of processes."""
    specific = {"cosine_with_restarts": {"num_cycles": args.lr_num_cycles}, "polynomial": {"power": args.lr_power}}
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup_steps(args.lr_warmup_steps, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=specific.get(args.lr_scheduler),
    )


def check_scheduler(name: str, warmup: float = 0.0) -> None:
    """Refuse an unknown schedule, and a warm-up that the schedule lacks, before anything is loaded.

    Raises:
        ValueError: a name that isn't in `SCHEDULES`; a warm-up (`--lr_warmup_steps`) for "constant", which has none.
    """
    if name not in SCHEDULES:
        raise ValueError(f"lr_scheduler is {name!r}, expected one of {', '.join(SCHEDULES)}.")
    if name == "constant" and warmup > 0:
        raise ValueError(
            f"lr_scheduler 'constant' has no warm-up, and lr_warmup_steps is {warmup:g}: use constant_with_warmup."
        )


def warmup_steps(value: float, total_steps: int) -> int:
    """The value of `--lr_warmup_steps` in optimizer steps; below 1 it is a share of all steps."""
    return round(value * total_steps) if value < 1 else int(value)


def hold_core(optimizer: Any) -> None:
    """Delete the core's gradients: the next step then leaves its weights and its Adam moments untouched."""
    for group in optimizer.param_groups:
        if group.get("name") == "core":
            for parameter in group["params"]:
                parameter.grad = None
