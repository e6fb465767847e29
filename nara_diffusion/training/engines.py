"""Start accelerate's engines (one process, DDP, FSDP2, DeepSpeed); load and prepare models in them.

Accumulation and clipping come from the arguments, not from the launcher's configuration. Some
engines would load only a part of a model, or round it: these functions load it whole, in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    parse_flag_from_env,
    patch_environment,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from nara_diffusion.noise.context import find_holders
from nara_diffusion.utils.wording import counted
from nara_flags.training import TrainingArguments

from .arguments import method_of

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
        deepspeed_plugin(accelerator).deepspeed_config |= {
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
    problems = {
        f"adapter {args.adapter} is saved by running its own small network, and {name} shards its weights": (
            method_of(args).family == "prompt" and stage in (0, 3)
        ),
        f"optimizer adafactor needs the rows of whole matrices, which {name} shards": (
            args.optimizer == "adafactor"
        ),
        f"ema_decay averages whole weights, and {name} shards or casts them": (
            args.ema_decay is not None
        ),
        f"load_in_4bit and load_in_8bit can't be trained under {name}, which shards or casts weights": args.bits,
        "mixed_precision is fp16, and DeepSpeed would round the trained weights and the core to it": (
            stage and accelerator.mixed_precision == "fp16"
        ),
        f"core_start_step is {args.core_start_step}, but DeepSpeed steps as soon as it has the gradients": (
            stage and args.core_start_step
        ),
    }
    for problem, is_present in problems.items():
        if is_present:
            raise ValueError(f"{problem}. Choose another value, or launch with --multi_gpu.")


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


def prepare(accelerator: Accelerator, model: nn.Module, *others: Any) -> list[Any]:
    """Call `accelerator.prepare` in a way that suits a model with an adapter under every engine.

    Mixed precision uses autocast under all engines, as it does under DDP. The mixed precision of
    FSDP2 and DeepSpeed would round the core's float32 weights, with an error of some per cent in
    C − I. DeepSpeed's would also round all trained weights. DeepSpeed's `torch_autocast` wouldn't
    apply to evaluation, which calls the model without DeepSpeed's wrapper.

    With --fsdp_cpu_ram_efficient_loading, accelerate copies the weights of the main process to all
    others. It expects a state dict with sharded tensors only, but the core's frequencies are a
    buffer that isn't sharded.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.mixed_precision == "bf16":
            model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
        with _without_bf16(accelerator):
            return list(accelerator.prepare(model, *others))
    if accelerator.distributed_type != DistributedType.FSDP:
        return list(accelerator.prepare(model, *others))
    plugin: Any = accelerator.state.fsdp_plugin
    if find_holders(model) and (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = None
        model.forward = torch.autocast(accelerator.device.type, policy.param_dtype)(model.forward)
    persistent = [(m, set(m._buffers) - m._non_persistent_buffers_set) for m in model.modules()]
    for module, names in persistent:
        module._non_persistent_buffers_set.update(names)
    try:
        prepared = accelerator.prepare(model, *others)
    finally:
        for module, names in persistent:
            module._non_persistent_buffers_set.difference_update(names)
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    return list(prepared)


@contextmanager
def _without_bf16(accelerator: Accelerator) -> Iterator[None]:
    """Remove bf16 from DeepSpeed's configuration inside the context, since it casts all weights."""
    config = deepspeed_plugin(accelerator).deepspeed_config
    launched = config["bf16"]
    config["bf16"] = {"enabled": False}
    try:
        yield
    finally:
        config["bf16"] = launched  # `accelerator.mixed_precision` reads it


@contextmanager
def loading_in(accelerator: Accelerator, dtype: torch.dtype) -> Iterator[None]:
    """Make `from_pretrained` return float32 weights under ZeRO-3 too, if `dtype` is float32.

    DeepSpeed would otherwise cast the weights to bf16 during loading.
    """
    with ExitStack() as undo:
        if dtype == torch.float32 and zero_stage(accelerator) == 3:
            plugin = deepspeed_plugin(accelerator)
            # `set_deepspeed_weakref` gives `from_pretrained` a copy of the configuration
            undo.callback(plugin.set_deepspeed_weakref)
            undo.enter_context(_without_bf16(accelerator))
            plugin.set_deepspeed_weakref()
        yield


def load_whole(accelerator: Accelerator, load: Callable[[], Any]) -> Any:
    """Call `load` so that `from_pretrained` gives each process the whole model under any engine.

    ZeRO-3 would give each process only a part of the model. --fsdp_cpu_ram_efficient_loading would
    give an empty model to all processes but the main one.
    """
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"), ExitStack() as undo:
        if zero_stage(accelerator) == 3:
            unset_hf_deepspeed_config()
            undo.callback(deepspeed_plugin(accelerator).set_deepspeed_weakref)
        return load()


def recompute_activations(model: PreTrainedModel) -> None:
    """Turn on the model's gradient checkpointing, in the form that needs no gradient of inputs."""
    # the name of the argument up to transformers 5.23, deprecated since then
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
