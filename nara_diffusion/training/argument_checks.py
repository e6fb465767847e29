"""The checks of the arguments that both train scripts share: values that no training can use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig

from nara_diffusion.cores.core import CUSTOM, check_core_type

from .adapters import adapter_config, method_of
from .arguments import TrainingArguments, schedule_of, window_of
from .optimization import check_optimizer


def check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for values that no run can use. The arguments' `__post_init__` calls it."""
    counts = (
        "rank",
        "train_batch_size",
        "gradient_accumulation_steps",
        "global_batch_size",
        "max_train_steps",
    )
    counts += (
        "logging_steps",
        "validation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
    )
    require(args, "at least 1", lambda value: value >= 1, *counts)
    rates = ("learning_rate", "core_learning_rate", "num_train_epochs", "max_grad_norm", "plan")
    require(args, "above 0", lambda value: value > 0, *rates)
    require(
        args,
        "at least 0",
        lambda value: value >= 0,
        "core_start_step",
        "lr_warmup_steps",
        "weight_decay",
    )
    require(
        args,
        "from 0 to 4294967295, as NumPy's generator takes it",
        lambda value: 0 <= value < 2**32,
        "seed",
    )
    require(args, "in [0, 1)", lambda value: 0 <= value < 1, "lora_dropout")
    try:
        window_of(args)
    except ValueError as error:
        raise ValueError(f"min_noise_level and max_noise_level: {error}") from error
    if args.global_batch_size is not None and args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps} and global_batch_size "
            f"{args.global_batch_size}, which already determines it: give only one of the two."
        )
    if args.core_module is not None:
        import_core_module(args.core_module)
    check_core_type(args.core_type)
    check_adapter(args, adapter_config(args, strength=schedule_of(args)))
    check_optimizer(args)
    family, start = method_of(args).family, args.init_adapter
    if start is not None and not Path(start).expanduser().exists():
        raise ValueError(f"init_adapter is {start!r}: there is no such file or folder.")
    if start is not None and family not in ("nara", "lora"):
        raise ValueError(
            f"init_adapter starts from a LoRA or a NaRA, which adapter {args.adapter} is not: give nara."
        )
    if args.check and args.plan is not None:
        raise ValueError("check measures a training, and plan computes what it needs: give one.")
    if args.check and (
        family in ("prompt", "full") or args.resume_from_checkpoint or args.hub_model_id or start
    ):
        raise ValueError(
            "check measures, before a training, what λ is worth to a low-rank adapter: leave resume_from_checkpoint, "
            "hub_model_id and init_adapter out, and give adapter nara or lora."
        )


def require(
    args: TrainingArguments, expected: str, holds: Callable[[Any], bool], *names: str
) -> None:
    """Raise ValueError for the first of `names` if `holds(value)` is false; None counts as not set.

    The message contains the argument's name, its value and what was `expected`.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} must be {expected}, got {value}.")


def check_adapter(args: TrainingArguments, config: PeftConfig | None) -> None:
    """Raise ValueError for settings that contradict the method, or its `config`."""
    method = method_of(args)
    meant = method.fixed.get("core_type", args.core_type if method.family == "nara" else "none")
    if args.core_type not in ("hypernetwork", meant):
        raise ValueError(
            f"core_type is {args.core_type!r}, but that of adapter {args.adapter} is {meant}."
        )
    if args.core_start_step and getattr(config, "core_init", None) == "kaiming":
        raise ValueError(
            "core_start_step trains A and B with C = I first, but core_init 'kaiming' starts from another C: "
            "use core_init 'zero_last', or core_start_step 0."
        )


def import_core_module(name: str) -> None:
    """Import the module `name`, or the file if it ends in .py; add its folder to `sys.path`.

    Raises:
        ValueError: there is no such module, its import fails, or it registers no core.
    """
    folder = str(Path(name).resolve().parent)
    if name.endswith(".py") and folder not in sys.path:
        sys.path.append(folder)
    try:
        importlib.import_module(module_name(name))
    except Exception as error:  # user code may raise anything
        raise ValueError(
            f"core_module {name!r} can't be imported: {type(error).__name__}: {error}"
        ) from error
    if not CUSTOM:
        raise ValueError(
            f"core_module {name!r} registers no core: call nara_diffusion.register_core(NAME, …) in it."
        )


def module_name(name: str) -> str:
    """Return the name under which Python imports the module that `--core_module` names."""
    return Path(name).stem if name.endswith(".py") else name
