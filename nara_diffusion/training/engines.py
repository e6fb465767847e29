"""Start accelerate's engines: one process, DDP, FSDP2, DeepSpeed.

Accumulation and clipping come from the arguments, not from the launcher's configuration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    parse_flag_from_env,
)

from nara_diffusion.utils.wording import counted
from nara_flags.training import TrainingArguments

from .methods import method_of

SHARDED = {
    DistributedType.FSDP: ("ACCELERATE_USE_FSDP", "FSDP"),
    DistributedType.DEEPSPEED: ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
}
"""{engine that needs all processes in each forward: (environment variable to select it, name)}."""


def start_accelerator(args: TrainingArguments) -> Accelerator:
    """Return the engine that the launcher asks for, with accumulation and clipping from `args`.

    Raises:
        ValueError: the launcher asks for FSDP1; there is no GPU, but the engine or fp16 needs one;
            or accelerate doesn't start the requested engine. See also `accumulation_steps` and
            `check_sharded`.
    """
    engines = {
        kind: name for kind, (variable, name) in SHARDED.items() if parse_flag_from_env(variable)
    }
    for name in engines.values():
        if name == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "accelerate is set to FSDP1, which PyTorch is dropping. Launch with --fsdp_version 2."
            )
        if not torch.accelerator.is_available() and "ACCELERATE_TORCH_DEVICE" not in os.environ:
            raise ValueError(
                f"The launcher asks for {name}, which needs a GPU, and there is none here. Launch with --multi_gpu."
            )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    steps = accumulation_steps(args, launched)
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps),
        mixed_precision=args.mixed_precision,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        log_with=[*args.report_to] if args.report_to else None,
        # trackers need a folder already; `Run.open` sets the final folder
        project_config=ProjectConfiguration(logging_dir="."),
        step_scheduler_with_optimizer=False,  # the loop steps the schedule once per optimizer step
    )
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate found no GPU and would run each of them alone. On "
            "CPU, launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu."
        )
    for kind, name in engines.items():
        if accelerator.distributed_type != kind:
            raise ValueError(
                f"The launcher asks for {name}, but accelerate started without it. Launch several processes."
            )
    if accelerator.distributed_type in SHARDED:
        check_sharded(accelerator, args)
    # accelerate would leave out scaling
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "mixed_precision fp16 needs a GPU, and accelerate finds none. Use bf16 or no."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config: dict[str, Any] = deepspeed_plugin(accelerator).deepspeed_config
        config |= {
            "gradient_accumulation_steps": steps,
            "gradient_clipping": args.max_grad_norm or 0.0,
        }
    return accelerator


def accumulation_steps(args: TrainingArguments, processes: int) -> int:
    """Return the number of forwards that one process accumulates for an optimizer step.

    This is --gradient_accumulation_steps. If --global_batch_size is set, it is divided by
    `processes` and by the batch of a forward instead.

    Raises:
        ValueError: the global batch can't be divided evenly.
    """
    if args.global_batch_size is None:
        return args.gradient_accumulation_steps
    together = args.train_batch_size * processes
    if args.global_batch_size % together:
        raise ValueError(
            f"global_batch_size ({args.global_batch_size}) must be a multiple of the {together} samples of one forward "
            f"(train_batch_size {args.train_batch_size} on {counted(processes, 'process')}). Change one of the two, or "
            "launch another number of processes (--num_processes)."
        )
    return args.global_batch_size // together


def check_sharded(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Raise ValueError for arguments that train or save differently under engines in `SHARDED`."""
    stage, name = zero_stage(accelerator), SHARDED[accelerator.distributed_type][1]
    reason = ""
    if method_of(args).family == "prompt" and stage in (0, 3):
        reason = f"adapter {args.adapter} is saved by running its own small network, and {name} shards its weights"
    elif args.optimizer == "adafactor":
        reason = f"optimizer adafactor needs the rows of whole matrices, which {name} shards"
    elif args.ema_decay is not None:
        reason = f"ema_decay averages whole weights, and {name} shards or casts them"
    elif args.bits:
        reason = f"load_in_4bit and load_in_8bit can't be trained under {name}, which shards or casts weights"
    elif stage and accelerator.mixed_precision == "fp16":
        reason = "mixed_precision is fp16, and DeepSpeed would round the trained weights and the core to it"
    elif stage and args.core_start_step:
        reason = f"core_start_step is {args.core_start_step}, but DeepSpeed steps as soon as it has the gradients"
    if reason:
        raise ValueError(f"{reason}. Choose another value, or launch with --multi_gpu.")


def check_whole(accelerator: Accelerator, reason: str) -> None:
    """Raise ValueError if the engine shards weights; call this for models that can't be sharded.

    Args:
        reason: the start of the message.
    """
    if accelerator.distributed_type == DistributedType.FSDP or zero_stage(accelerator) == 3:
        name = SHARDED[accelerator.distributed_type][1]
        raise ValueError(
            f"{reason}, and {name} would shard them. Launch with --multi_gpu, or with ZeRO-2."
        )


def engine_name(accelerator: Accelerator) -> str:
    """Return the engine's name; engines with equal names store the optimizer in the same form."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP2 with {accelerator.state.fsdp_plugin.state_dict_type.name}"  # type: ignore[union-attr]
    stage = zero_stage(accelerator)
    return f"DeepSpeed ZeRO-{stage}" if stage else "one process or DDP"


def zero_stage(accelerator: Accelerator) -> int:
    """Return DeepSpeed's ZeRO stage, from 1 to 3, or 0 under another engine."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return deepspeed_plugin(accelerator).zero_stage


def deepspeed_plugin(accelerator: Accelerator) -> DeepSpeedPlugin:
    """Return the plugin of an accelerator that runs DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None
    return plugin


def split_across_processes(
    accelerator: Accelerator, count: int, work: Callable[[Sequence[int]], Sequence[Any]]
) -> list[Any]:
    """Share `work` on 0 … count − 1 between all processes, and return all results on each of them.

    The results are in the order of the indices.

    Args:
        work: a function that takes indices and returns a picklable result for each.
    """
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    mine = range(count) if accelerator.distributed_type in SHARDED else mine
    results = dict(gather_object(list(zip(mine, work(mine) if mine else [], strict=True))))
    return [results[i] for i in range(count)]
