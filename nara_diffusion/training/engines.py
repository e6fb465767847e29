"""accelerate's engines (one process, DDP, FSDP2, DeepSpeed): starting one, preparing a model, and its state.

| engine           | weights                        | optimizer, in a checkpoint                          |
|------------------|--------------------------------|-----------------------------------------------------|
| one process, DDP | each process has them          | optimizer.bin                                       |
| FSDP2            | gathered, frozen ones left out | optimizer_0/ (optimizer.bin with FULL_STATE_DICT)   |
| DeepSpeed ZeRO   | gathered under stage 3         | deepspeed/: parts of it, float32 weights among them |

`accelerator.save_state` would store the frozen base model too under FSDP, and hand no weights to hooks under either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    load_fsdp_optimizer,
    parse_flag_from_env,
    save_fsdp_optimizer,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from nara_diffusion.noise.level import find_holders
from nara_diffusion.utils.naming import counted

from .adapters import method_of
from .arguments import TrainingArguments

DEEPSPEED_FOLDER = "deepspeed"
SHARDED = {  # engines whose forward runs on all processes or hangs: (what asks for them, their name)
    DistributedType.FSDP: ("ACCELERATE_USE_FSDP", "FSDP"),
    DistributedType.DEEPSPEED: ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
}


# ---------------------------------------------------------------- starting


def start_accelerator(args: TrainingArguments) -> Accelerator:
    """The engine that the launcher asked for; what `args` say of accumulation and clipping wins over its own files.
    Raises ValueError for FSDP1, an engine or fp16 that needs a GPU, one that accelerate replaces, and as
    `accumulation_steps`, `check_sharded`."""
    asked = {
        kind: name for kind, (variable, name) in SHARDED.items() if parse_flag_from_env(variable)
    }
    for name in asked.values():
        if name == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "accelerate is set to FSDP1, which PyTorch gives up: launch with --fsdp_version 2."
            )
        if not torch.accelerator.is_available() and "ACCELERATE_TORCH_DEVICE" not in os.environ:
            raise ValueError(
                f"{name} was asked for, which accelerate has on GPUs only, and there is none here."
            )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    steps = accumulation_steps(args, launched)
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps),
        mixed_precision=args.mixed_precision,
        log_with=[*args.report_to] if args.report_to else None,
        project_config=ProjectConfiguration(
            logging_dir="."
        ),  # asked for by trackers; `Run.open` gives the true one
        step_scheduler_with_optimizer=False,  # the loop steps the schedule once an optimizer step
    )
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, and accelerate runs each alone: it finds no GPU. On CPU, launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu."
        )
    for kind, name in asked.items():
        if accelerator.distributed_type != kind:
            raise ValueError(
                f"{name} was asked for, and accelerate runs without it: launch several processes."
            )
    if accelerator.distributed_type in SHARDED:
        check_sharded(accelerator, args)
    if (
        accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    ):  # accelerate would leave out scaling
        raise ValueError(
            "mixed_precision is fp16, which needs a GPU, and accelerate finds none: give bf16 or no."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config  # type: ignore[union-attr]
        config |= {
            "gradient_accumulation_steps": steps,
            "gradient_clipping": args.max_grad_norm or 0.0,
        }
    return accelerator


def accumulation_steps(args: TrainingArguments, processes: int) -> int:
    """Forwards of one process that make an optimizer step: --gradient_accumulation_steps, or what --global_batch_size
    leaves to each of `processes`. Raises ValueError if it can't be divided evenly."""
    if args.global_batch_size is None:
        return args.gradient_accumulation_steps
    together = args.train_batch_size * processes
    steps, rest = divmod(args.global_batch_size, together)
    if rest:
        raise ValueError(
            f"global_batch_size {args.global_batch_size} isn't a multiple of the {together} samples of one forward "
            f"(train_batch_size {args.train_batch_size}, {counted(processes, 'process')}): launch another number "
            "(--num_processes), or change one of the two."
        )
    return steps


def global_batch(accelerator: Accelerator, args: TrainingArguments) -> int:
    """Samples of one optimizer step, over all processes and accumulated forwards."""
    return (
        args.train_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes
    )


def check_sharded(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Raises ValueError for arguments that an engine of `SHARDED` would train or save otherwise."""
    stage, name = zero_stage(accelerator), SHARDED[accelerator.distributed_type][1]
    wrong = ""
    if method_of(args).family == "prompt" and stage in (0, 3):
        wrong = f"adapter {args.adapter} is saved by running its own small network, whose weights {name} shards"
    elif args.optimizer == "adafactor":
        wrong = (
            f"optimizer adafactor takes means over the rows of whole matrices, which {name} shards"
        )
    elif args.is_quantised:
        wrong = f"load_in_4bit and load_in_8bit aren't trained under {name}, which shards or casts weights"
    elif stage and accelerator.mixed_precision == "fp16":
        wrong = "mixed_precision is fp16, in which DeepSpeed would round the trained weights and the core"
    elif stage and args.core_start_step:
        wrong = f"core_start_step is {args.core_start_step}, but DeepSpeed steps as soon as it has the gradients"
    if wrong:
        raise ValueError(f"{wrong}: give another, or launch with --multi_gpu.")


def engine_name(accelerator: Accelerator) -> str:
    """The engine by the form in which it keeps the optimizer."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP2 with {accelerator.state.fsdp_plugin.state_dict_type.name}"  # type: ignore[union-attr]
    stage = zero_stage(accelerator)
    return f"DeepSpeed ZeRO-{stage}" if stage else "one process or DDP"


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage, 1 to 3; 0 under other engines."""
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.state.deepspeed_plugin.zero_stage if is_deepspeed else 0  # type: ignore[union-attr]


def split_across_processes(
    accelerator: Accelerator, count: int, work: Callable[[Sequence[int]], Sequence[Any]]
) -> list[Any]:
    """The results of `work` (indices → a picklable one for each) for 0 … count − 1, in order, on every process, of
    which each computes a share."""
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    mine = range(count) if accelerator.distributed_type in SHARDED else mine
    results = dict(gather_object(list(zip(mine, work(mine) if mine else [], strict=True))))
    return [results[i] for i in range(count)]


# ---------------------------------------------------------------- preparing and loading


def prepare(accelerator: Accelerator, model: nn.Module, *others: Any) -> list[Any]:
    """`accelerator.prepare` for a model with an adapter, also under FSDP2 and DeepSpeed.

    Mixed precision is autocast, as under DDP, since that of the engines rounds the weights of the core, which are
    float32 (C − I is some per cent off then), and DeepSpeed's the trained ones. Its `torch_autocast` would leave out
    evaluation, which calls the model without DeepSpeed's wrapper.

    With --fsdp_cpu_ram_efficient_loading accelerate gives all processes the weights of the main one, and expects
    nothing but sharded tensors in a state dict: the core's frequencies are a buffer.
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
    """Inside, DeepSpeed's configuration asks for no bf16 of its own, which casts all weights."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config  # type: ignore[union-attr]
    own = config["bf16"]
    config["bf16"] = {"enabled": False}
    try:
        yield
    finally:
        config["bf16"] = own  # `accelerator.mixed_precision` reads it


@contextmanager
def loading_in(accelerator: Accelerator, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `from_pretrained` gives float32 weights under ZeRO-3 too, if that is `dtype`: DeepSpeed's bf16 would cast
    them as they are loaded."""
    if dtype != torch.float32 or zero_stage(accelerator) != 3:
        yield
        return
    plugin: Any = accelerator.state.deepspeed_plugin
    with ExitStack() as undo:
        undo.callback(
            plugin.set_deepspeed_weakref
        )  # a copy of the configuration, for `from_pretrained`
        undo.enter_context(_without_bf16(accelerator))
        plugin.set_deepspeed_weakref()
        yield


def load_whole(accelerator: Accelerator, load: Callable[[], Any]) -> Any:
    """Call `load` so that `from_pretrained` gives each process the whole model, whatever the engine: no
    parts of one (ZeRO-3), nor an empty one in all processes but the main (--fsdp_cpu_ram_efficient_loading)."""
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(variable, None)
    if zero_stage(accelerator) == 3:
        unset_hf_deepspeed_config()
    try:
        return load()
    finally:
        if before is not None:
            os.environ[variable] = before
        if zero_stage(accelerator) == 3:
            accelerator.state.deepspeed_plugin.set_deepspeed_weakref()  # type: ignore[union-attr]


# ---------------------------------------------------------------- state


def trained_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """{name in the model without wrappers: whole tensor}, on the main process, of all that is trained, and of buffers;
    of `model` as `accelerator.prepare` returned it. Every process calls it."""
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        _reshard(model)
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]
    inner: Any = accelerator.unwrap_model(
        model
    )  # whose type depends on whether DeepSpeed is installed
    state = dict(inner.state_dict())
    if zero_stage(accelerator) == 3:
        import deepspeed  # type: ignore[import-not-found]

        for name, parameter in inner.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(name, None)
            elif name in state:
                with deepspeed.zero.GatheredParameters([parameter]):
                    if accelerator.is_main_process:
                        state[name] = parameter.detach().cpu().clone()
    return state


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Write optimizer, schedule, scaler and random states, but no weights, to `folder`. Every process calls it."""
    engine, (model,), (optimizer,) = (
        accelerator.distributed_type,
        accelerator._models,
        accelerator._optimizers,
    )
    if engine == DistributedType.FSDP:
        _reshard(model)
        # without accelerate's wrapper, whose scaler would see the steps by which PyTorch makes room for states
        save_fsdp_optimizer(
            accelerator.state.fsdp_plugin, accelerator, optimizer.optimizer, model, str(folder), 0
        )
    elif engine == DistributedType.DEEPSPEED:
        model.save_checkpoint(
            str(folder), DEEPSPEED_FOLDER, save_latest=False, exclude_frozen_parameters=True
        )
    own, rank = [] if engine in SHARDED else [optimizer], accelerator.process_index
    state = (
        [],
        own,
        accelerator._schedulers,
        accelerator._dataloaders,
        rank,
        accelerator.step,
        accelerator.scaler,
    )
    save_accelerator_state(str(folder), *state)


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Restore what `save_state` wrote, after `accelerator.prepare` was called. Every process calls it. A schedule of
    another length than it had gives the next step its own rates."""
    engine, (model,), (optimizer,) = (
        accelerator.distributed_type,
        accelerator._models,
        accelerator._optimizers,
    )
    if engine == DistributedType.FSDP:
        _reshard(model)
        load_fsdp_optimizer(
            accelerator.state.fsdp_plugin, accelerator, optimizer.optimizer, model, str(folder), 0
        )
    elif engine == DistributedType.DEEPSPEED:
        # its float32 weights with it; the frozen ones aren't there
        model.load_checkpoint(str(folder), DEEPSPEED_FOLDER, load_module_strict=False)
    own, rank = [] if engine in SHARDED else [optimizer], accelerator.process_index
    state = ([], own, accelerator._schedulers, accelerator._dataloaders, rank, accelerator.scaler)
    accelerator.step = load_accelerator_state(str(folder), *state).get("step", accelerator.step)
    for schedule in (each.scheduler for each in accelerator._schedulers):
        rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, (peak, share) in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * share(schedule.last_epoch)


def _reshard(model: nn.Module) -> None:
    """Shard the outermost weights again, which FSDP leaves gathered after a forward without a backward: PyTorch
    doesn't find gathered ones in the optimizer."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
