"""Checks of accelerate's engine before anything is loaded: it has to be the one asked for, and able to train."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from nara_diffusion.training.adapters.methods import METHODS

from .state import zero_stage

_ASKED = {
    DistributedType.FSDP: ("ACCELERATE_USE_FSDP", "FSDP"),
    DistributedType.DEEPSPEED: ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
}


def launched_processes() -> int:
    """The number of processes that the launcher started, from the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_engine(accelerator: Accelerator, args: Any) -> None:
    """Refuse an engine that isn't the one that was asked for, or that would train otherwise than `args` say.

    Raises:
        ValueError: accelerate sees fewer processes than were launched; FSDP or DeepSpeed was asked for and accelerate
            gives another engine; FSDP1; an adapter, an optimizer, --core_start_step or --max_grad_norm that the engine
            would ignore or compute otherwise;
            fp16 without a GPU or under DeepSpeed.
    """
    _check_processes(accelerator.num_processes)
    _check_asked(accelerator.distributed_type)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("accelerate is set to FSDP1, which PyTorch gives up: launch with --fsdp_version 2.")
    check_adapter(args.adapter, accelerator.distributed_type, sharded=is_sharded(accelerator))
    if args.optimizer == "adafactor" and accelerator.distributed_type in _ASKED:
        raise ValueError(
            "optimizer adafactor takes means over the rows and columns of whole matrices, which "
            f"{_ASKED[accelerator.distributed_type][1]} shards: launch with --multi_gpu, or use AdamW."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin: Any = accelerator.state.deepspeed_plugin
        _check_deepspeed(plugin.deepspeed_config, args)
        if accelerator.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision is fp16, in which DeepSpeed would round the trained weights and the core: give "
                "--mixed_precision bf16, which keeps them in float32, or launch with --multi_gpu or FSDP."
            )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU, and accelerate found none: use bf16 or no.")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds a part of each weight only."""
    return accelerator.distributed_type == DistributedType.FSDP or zero_stage(accelerator) == 3


def check_adapter(adapter: str, engine: DistributedType, *, sharded: bool) -> None:
    """Raises ValueError for an adapter that the engine can't train or can't save."""
    remedy = "launch with --multi_gpu, or choose another adapter."
    if adapter == "adalora" and engine in _ASKED:
        raise ValueError(
            f"adapter adalora weighs whole gradients to drop directions, and {_ASKED[engine][1]} shards them: {remedy}"
        )
    if sharded and METHODS[adapter].family == "prompt":
        raise ValueError(
            f"adapter {adapter} is saved by running its own small network, whose weights {_ASKED[engine][1]} shards: "
            f"{remedy}"
        )


def _check_processes(seen: int) -> None:
    """Refuse to run where N processes were launched and accelerate sees one: on CPU, it has to be told."""
    launched = launched_processes()
    # what `accelerate launch --cpu --num_processes N` leaves behind when it starts one process after all
    ignored = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if launched != seen or (ignored and "WORLD_SIZE" not in os.environ):
        raise ValueError(
            f"{launched if launched > 1 else 'several'} processes were asked for, but accelerate sees {seen}. On CPU, "
            "launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N (--cpu starts one)."
        )


def _check_asked(given: DistributedType) -> None:
    """Raise if FSDP or DeepSpeed was asked for: on CPU and in one process, accelerate silently ignores both."""
    for engine, (variable, name) in _ASKED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1") and given != engine:
            raise ValueError(
                f"{name} was asked for ({variable} is set), but accelerate gives {given.value} here: it has {name} on "
                f"several GPUs or their like only, started by accelerate launch. Launch without {name}, or on GPUs."
            )


def _check_deepspeed(config: dict[str, Any], args: Any) -> None:
    """Refuse settings that DeepSpeed's own configuration contradicts: it clips and steps within its backward."""
    if args.core_start_step:
        raise ValueError(
            f"core_start_step is {args.core_start_step}, but DeepSpeed steps as soon as it has the gradients, the "
            "core's included: leave it at 0, or launch with --multi_gpu or FSDP."
        )
    limit = args.max_grad_norm or 0.0  # 0 is DeepSpeed's none
    found = config.get("gradient_clipping", "auto")
    if found not in ("auto", limit):
        raise ValueError(
            f"DeepSpeed's configuration says gradient_clipping {found}, and the arguments max_grad_norm "
            f"{args.max_grad_norm}: make them equal, or set gradient_clipping to auto."
        )
    config["gradient_clipping"] = limit
