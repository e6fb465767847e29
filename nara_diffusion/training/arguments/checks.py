"""Checks of the shared arguments: values that no run can use, and values that a resumed run may not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nara_diffusion.cores.registry import check_core_type
from nara_diffusion.training.adapters.custom_core import import_core_module
from nara_diffusion.training.adapters.init_adapter import check_init_adapter
from nara_diffusion.training.adapters.method_arguments import check_method
from nara_diffusion.training.adapters.methods import METHODS, effective

from .common import refuse_both_batch_sizes
from .values import default_of


def check_arguments(args: Any) -> None:
    """Raises ValueError for values that no run can use. Each script's arguments call it in `__post_init__`."""
    if args.core_module is not None:
        import_core_module(args.core_module)
    check_core_type(args.core_type)
    check_method(args)
    check_init_adapter(args)
    for name in (
        "rank",
        "num_virtual_tokens",
        "train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "lr_num_cycles",
    ):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    if args.global_batch_size is not None and args.gradient_accumulation_steps != 1:
        refuse_both_batch_sizes(args)
    for name in (
        "global_batch_size",
        "max_train_steps",
        "validation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
    ):
        value = getattr(args, name)
        require(args, name, value is None or value >= 1, "at least 1, or none")
    for name in ("learning_rate", "num_train_epochs", "lr_power"):
        require(args, name, getattr(args, name) > 0, "above 0")
    for name in ("core_start_step", "lr_warmup_steps", "weight_decay", "dataloader_num_workers"):
        require(args, name, getattr(args, name) >= 0, "at least 0")
    require(
        args, "core_learning_rate", args.core_learning_rate is None or args.core_learning_rate > 0, "above 0, or none"
    )
    require(args, "seed", 0 <= args.seed < 2**32, "from 0 to 4294967295, as NumPy's generator takes it")
    require(args, "lora_dropout", 0 <= args.lora_dropout < 1, "in [0, 1)")
    require(args, "max_grad_norm", args.max_grad_norm is None or args.max_grad_norm > 0, "above 0, or none")
    if args.check:
        _check_checkable(args)
    _check_optimizer(args)
    if args.push_to_hub and args.hub_model_id is None and args.output_dir is None:
        raise ValueError(
            "push_to_hub needs the name of a repository: give hub_model_id (or output_dir, which names one)."
        )
    has_init = effective(args, "core_type") in ("hypernetwork", "constant")
    if args.core_start_step and has_init and args.core_init == "kaiming":
        raise ValueError(
            "core_start_step trains A and B with C = I first, but core_init 'kaiming' starts from another C: "
            "use core_init 'zero_last', or core_start_step 0."
        )


def _check_optimizer(args: Any) -> None:
    if args.use_8bit_adam and args.optimizer != "AdamW":
        raise ValueError(
            f"use_8bit_adam is a form of AdamW, but the optimizer is {args.optimizer}: give one of the two."
        )
    if args.optimizer != "adafactor":
        return
    for field in dataclasses.fields(args):
        if field.name in ("adam_beta1", "adam_beta2", "adam_epsilon") and getattr(args, field.name) != field.default:
            raise ValueError(
                f"{field.name} is {getattr(args, field.name)}, which optimizer adafactor doesn't read: leave it out."
            )


def _check_checkable(args: Any) -> None:
    if METHODS[args.adapter].family in ("prompt", "full"):
        raise ValueError(
            f"check asks what λ tells a low-rank adapter, but adapter is {args.adapter!r}: give nara, or lora."
        )
    for name in ("resume_from_checkpoint", "push_to_hub", "init_adapter"):
        if getattr(args, name):
            raise ValueError(f"check measures before a training, and {name} is {getattr(args, name)!r}: leave it out.")


def config_differences(args: Any, saved: Mapping[str, Any], digests: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """{name: (saved value, current value)} of the arguments that a resumed run may not change.

    Args:
        digests: {content: digest} of the contents that are compared instead of their names (see `option`).
    """
    fields = [field for field in dataclasses.fields(args) if not field.metadata.get("resumable")]
    return _differences(args, saved, [field.name for field in fields if field.metadata.get("content") not in digests])


def content_differences(args: Any, saved: Mapping[str, Any], content: str) -> dict[str, tuple[Any, Any]]:
    """{name: (saved value, current value)} of the arguments that name `content` and differ."""
    fields = dataclasses.fields(args)
    return _differences(args, saved, [field.name for field in fields if field.metadata.get("content") == content])


def _differences(args: Any, saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    current = dataclasses.asdict(args)
    defaults = {field.name: field for field in dataclasses.fields(args)}
    # a checkpoint of an earlier version lacks an argument that was added since
    then = {name: saved[name] if name in saved else default_of(defaults[name]) for name in names}
    return {name: (value, current[name]) for name, value in then.items() if value != current[name]}


def refuse_unread(args: Any, name: str, reader: str, values: Sequence[str], unset: Any = None) -> None:
    """Raises ValueError if `name` is set, and the argument `reader` has none of the `values` with which it is read."""
    if getattr(args, name) != unset and getattr(args, reader) not in values:
        raise ValueError(
            f"{name} is {getattr(args, name)}, which {reader} {getattr(args, reader)} doesn't read: give "
            f"{' or '.join(values)}, or leave it out."
        )


def require(args: Any, name: str, holds: bool, expected: str) -> None:
    """Raises ValueError with the argument's name, its value and what was `expected`, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {getattr(args, name)}.")
