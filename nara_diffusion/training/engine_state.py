"""Save and restore an engine's state: weights, their average, optimizer, schedule, random states.

| engine           | weights                        | optimizer, in a checkpoint                  |
|------------------|--------------------------------|---------------------------------------------|
| one process, DDP | each process has them          | optimizer.bin                               |
| FSDP2            | gathered, without frozen ones  | optimizer_0/, or with FULL_STATE_DICT       |
|                  |                                | optimizer.bin                               |
| DeepSpeed ZeRO   | gathered under stage 3         | deepspeed/: its parts, with float32 weights |

This module replaces `accelerator.save_state`, which also stores the frozen base model under FSDP,
and passes no weights to hooks under FSDP and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import DistributedType, load_fsdp_optimizer, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .engines import SHARDED, zero_stage

DEEPSPEED_FOLDER = "deepspeed"
AVERAGE = "ema.bin"


def trained_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Return {name in the model without wrappers: whole tensor} of all trained weights and buffers.

    Every process calls this function, but only the main process gets the tensors. `model` is the
    model that `accelerator.prepare` returned.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        _reshard(model)
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]
    inner = cast(nn.Module, accelerator.unwrap_model(model))
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


@torch.no_grad()
def write_trained(accelerator: Accelerator, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the whole tensors in `state` into the parameters of the same names.

    Every process calls this function, after training: the optimizer's own copies don't change.
    """
    _reshard(model)
    for name, parameter in model.named_parameters():
        if name not in state:
            continue
        tensor = state[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        if zero_stage(accelerator) == 3:
            import deepspeed  # type: ignore[import-not-found]

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensor)
        else:
            parameter.copy_(tensor)


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Write optimizer, schedule, scaler, random states and the average of weights, but no weights.

    Every process calls this function.
    """
    engine = accelerator.distributed_type
    [model], [optimizer] = accelerator._models, accelerator._optimizers
    if engine == DistributedType.FSDP:
        _reshard(model)
        # unwrapped: PyTorch allocates states by a step that accelerate's scaler would notice
        save_fsdp_optimizer(
            accelerator.state.fsdp_plugin, accelerator, optimizer.optimizer, model, str(folder), 0
        )
    elif engine == DistributedType.DEEPSPEED:
        model.save_checkpoint(
            str(folder), DEEPSPEED_FOLDER, save_latest=False, exclude_frozen_parameters=True
        )
    save_accelerator_state(
        str(folder),
        [],
        [] if engine in SHARDED else [optimizer],
        accelerator._schedulers,
        accelerator._dataloaders,
        accelerator.process_index,
        accelerator.step,
        accelerator.scaler,
    )
    for average in accelerator._custom_objects:
        accelerator.save(average.state_dict(), folder / AVERAGE)


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Restore the states that `save_state` wrote, after `accelerator.prepare`.

    Every process calls this function.

    If the length of the schedule has changed, the next step takes its learning rates from the new
    schedule.
    """
    engine = accelerator.distributed_type
    [model], [optimizer] = accelerator._models, accelerator._optimizers
    if engine == DistributedType.FSDP:
        _reshard(model)
        load_fsdp_optimizer(
            accelerator.state.fsdp_plugin, accelerator, optimizer.optimizer, model, str(folder), 0
        )
    elif engine == DistributedType.DEEPSPEED:
        # this also loads the float32 weights; the frozen weights are not in the file
        model.load_checkpoint(str(folder), DEEPSPEED_FOLDER, load_module_strict=False)
    loaded = load_accelerator_state(
        str(folder),
        [],
        [] if engine in SHARDED else [optimizer],
        accelerator._schedulers,
        accelerator._dataloaders,
        accelerator.process_index,
        accelerator.scaler,
    )
    accelerator.step = loaded.get("step", accelerator.step)
    for average in accelerator._custom_objects:
        average.load_state_dict(
            torch.load(folder / AVERAGE, map_location=accelerator.device, weights_only=True)
        )
    for wrapped in accelerator._schedulers:
        schedule = wrapped.scheduler
        rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, (peak, share) in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * share(schedule.last_epoch)


def _reshard(model: nn.Module) -> None:
    """Shard the outermost weights again, which FSDP gathers in a forward without backward.

    PyTorch can't match gathered weights with the optimizer's states.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
