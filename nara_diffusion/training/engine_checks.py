"""Checks of accelerate's engine before anything is loaded: it has to be the one asked for, and able to train."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from .engines import SHARDED, zero_stage
from .methods import method_of


def check_engine(accelerator: Accelerator, args: Any) -> None:
    """Refuse an engine that isn't the one that was asked for, or that would train otherwise than `args` say.

    Raises:
        ValueError: accelerate sees fewer processes than were launched; FSDP or DeepSpeed was asked for and accelerate
            gives another engine; FSDP1; an adapter, an optimizer, core_start_step or max_grad_norm that the engine
            would ignore or compute otherwise; fp16 without a GPU or under DeepSpeed.
    """
    engine, launched = accelerator.distributed_type, launched_processes()
    # what `accelerate launch --cpu --num_processes N` leaves behind when it starts one process after all
    ignored = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if launched != accelerator.num_processes or (ignored and "WORLD_SIZE" not in os.environ):
        raise ValueError(
            f"{launched if launched > 1 else 'several'} processes were asked for, but accelerate sees "
            f"{accelerator.num_processes}. On CPU, launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes N (--cpu starts one)."
        )
    for asked, (variable, name) in SHARDED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1") and engine != asked:
            raise ValueError(
                f"{name} was asked for ({variable} is set), but accelerate gives {engine.value} here: it has {name} on "
                f"several GPUs or their like only, started by accelerate launch. Launch without {name}, or on GPUs."
            )
    if engine == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("accelerate is set to FSDP1, which PyTorch gives up: launch with --fsdp_version 2.")
    if method_of(args).family == "prompt" and (engine == DistributedType.FSDP or zero_stage(accelerator) == 3):
        raise ValueError(
            f"adapter {args.adapter} is saved by running its own small network, whose weights {SHARDED[engine][1]} "
            "shards: launch with --multi_gpu, or choose another adapter."
        )
    if args.optimizer == "adafactor" and engine in SHARDED:
        raise ValueError(
            "optimizer adafactor takes means over the rows and columns of whole matrices, which "
            f"{SHARDED[engine][1]} shards: launch with --multi_gpu, or use AdamW."
        )
    if engine in SHARDED and getattr(args, "is_quantised", False):
        raise ValueError(
            f"load_in_4bit and load_in_8bit aren't trained under {SHARDED[engine][1]}, which shards weights or casts "
            "them: launch with --multi_gpu, with the model whole on each GPU."
        )
    if engine == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator, args)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU, and accelerate found none: use bf16 or no.")


def launched_processes() -> int:
    """The number of processes that the launcher started, from the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _check_deepspeed(accelerator: Accelerator, args: Any) -> None:
    """Refuse settings that DeepSpeed's own configuration contradicts: it clips and steps within its backward."""
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision is fp16, in which DeepSpeed would round the trained weights and the core: give "
            "--mixed_precision bf16, which keeps them in float32, or launch with --multi_gpu or FSDP."
        )
    if args.core_start_step:
        raise ValueError(
            f"core_start_step is {args.core_start_step}, but DeepSpeed steps as soon as it has the gradients, the "
            "core's included: leave it at 0, or launch with --multi_gpu or FSDP."
        )
    config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config  # type: ignore[union-attr]
    limit, found = args.max_grad_norm or 0.0, config.get("gradient_clipping", "auto")  # 0 is DeepSpeed's none
    if found not in ("auto", limit):
        raise ValueError(
            f"DeepSpeed's configuration says gradient_clipping {found}, and the arguments max_grad_norm "
            f"{args.max_grad_norm}: make them equal, or set gradient_clipping to auto."
        )
    config["gradient_clipping"] = limit


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
    """Refuse an engine that accumulates otherwise than the arguments say: its steps would be of other batches.

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
