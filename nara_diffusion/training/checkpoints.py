"""The folder checkpoint-N: all that a run needs to continue exactly after step N.

    checkpoint-N/adapter_config.json,        the adapter, written by the run's `Writer`
                 adapter_model.safetensors
                 optimizer.bin,              as accelerate writes them; scaler.pt only with fp16;
                 scheduler.bin, scaler.pt    see the table for the optimizer's form
                 ema.bin                     the average of the weights, with --ema_decay
                 random_states_P.pkl         the random states of process P
                 checkpoint.json             the manifest: step, length of the schedule, losses not
                                             yet logged, number of processes, engine, arguments,
                                             digests of files, data, base and the manifest itself

The step is enough to find the place in the data, since their order in `utils.data_order` depends
only on (seed, position). A checkpoint contains neither the data nor the frozen base model, but
records the digests of both. A checkpoint is written under a temporary name and renamed when it is
complete. Only then are older checkpoints deleted.

| engine           | weights                        | optimizer, in a checkpoint                  |
|------------------|--------------------------------|---------------------------------------------|
| one process, DDP | each process has them          | optimizer.bin                               |
| FSDP2            | gathered, without frozen ones  | optimizer_0/, or with FULL_STATE_DICT       |
|                  |                                | optimizer.bin                               |
| DeepSpeed ZeRO   | gathered under stage 3         | deepspeed/: its parts, with float32 weights |

`save_state` replaces `accelerator.save_state`, which also stores the frozen base model under FSDP,
and passes no weights to hooks under FSDP and DeepSpeed.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import DistributedType, load_fsdp_optimizer, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from nara_diffusion.utils.files import atomic_write_files, digest_file, partial_name, put_in_place

from .engines import SHARDED, zero_stage

logger = logging.getLogger(__name__)

Writer = Callable[[Any, Path, dict[str, Any]], None]
"""Write an adapter's files: (model without wrappers, folder, the model's state dict) → None."""

MANIFEST = "checkpoint.json"
FORMAT = 2
_FIELDS = {"step", "total_steps", "data_start", "unlogged", "batch", "processes", "engine"}
_FIELDS |= {"arguments", "digests", "written", "files"}


def write_manifest(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Write checkpoint.json."""
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the content of checkpoint.json.

    Raises:
        ValueError: the file is missing, corrupt, or from version 0.1.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is missing or corrupt ({error}).") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint} was written by version 0.1, and this version can't continue it. Finish the run with 0.1, "
            "or start a new run from its adapter with --init_adapter."
        )
    if missing := sorted(_FIELDS - manifest.keys()):
        raise ValueError(f"{path} is corrupt: it has no {', '.join(missing)}.")
    return manifest


def save_checkpoint(
    accelerator: Accelerator,
    target: Path,
    facts: Mapping[str, Any],
    write: Writer,
    limit: int | None,
) -> None:
    """Write the checkpoint `target`, and delete the oldest checkpoints beyond `limit`.

    Every process calls this function.

    Args:
        facts: the fields of the manifest that the run sets.
        write: the function that writes the adapter's files.
        limit: number of checkpoints to keep; None keeps all.

    Raises:
        OSError: the checkpoint can't be written, for example because the disk is full. The partial
            checkpoint is then deleted, and earlier checkpoints are unchanged.
    """
    partial = partial_name(target)  # every process writes its random states into the same folder
    is_main = accelerator.is_main_process
    try:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        for model in accelerator._models:
            state = trained_state(accelerator, model)
            if is_main:
                write(accelerator.unwrap_model(model), partial, state)
        save_state(accelerator, partial)
        accelerator.wait_for_everyone()
        if is_main:
            files = {
                path.relative_to(partial).as_posix(): (path.stat().st_size, digest_file(path))
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            manifest = {"format": FORMAT, **facts, "written": time.time(), "files": files}
            write_manifest(partial, manifest)
            put_in_place(partial, target)
            older = [path for path in find_checkpoints(target.parent) if path != target]
            for path in [*older, target][:-limit] if limit else []:
                logger.info("deleting %s (--checkpoints_total_limit %d)", path, limit)
                shutil.rmtree(path)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{target} could not be written ({error}). Is the disk full? {resume_hint(target.parent)}"
        ) from error
    accelerator.wait_for_everyone()


def save_adapter(accelerator: Accelerator, model: Any, folder: Path, write: Writer) -> None:
    """Write the adapter's files to `folder`. Every process calls this function.

    Raises:
        OSError: the files can't be written.
    """
    state = trained_state(accelerator, model)
    if accelerator.is_main_process:
        try:
            with atomic_write_files(folder) as partial:
                write(accelerator.unwrap_model(model), partial, state)
        except Exception as error:
            raise OSError(
                f"The adapter could not be written to {folder} ({error}). Is the disk full? {resume_hint(folder)}"
            ) from error
    accelerator.wait_for_everyone()


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, in the order they were written.

    Their steps don't always ascend: a run that resumes from an earlier checkpoint writes lower
    steps later.
    """

    def written(path: Path) -> tuple[float, int]:
        try:
            when = read_manifest(path)["written"]
        except ValueError:
            when = path.stat().st_mtime
        return when, int(path.name.partition("-")[2])

    return sorted(
        (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\w+-\d+", path.name)),
        key=written,
    )


def resume_hint(folder: Path) -> str:
    """Return a sentence that names the checkpoint in `folder` to resume from."""
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        return "There is no checkpoint to continue from."
    return f"To continue, run the same command with --resume_from_checkpoint {checkpoints[-1]}"


def latest_undamaged(folder: Path) -> Path | None:
    """Return the latest undamaged checkpoint in `folder`; None if there is no checkpoint.

    Later checkpoints that are damaged are logged.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged: list[str] = []
    for path in reversed(find_checkpoints(folder)):
        try:
            check_files(path)
        except ValueError as error:
            damaged.append(str(error))
        else:
            if damaged:
                logger.warning("%s Resuming from the previous checkpoint.", " ".join(damaged))
            return path
    if damaged:
        raise ValueError(
            f"--resume_from_checkpoint latest: all checkpoints in {folder} are damaged. {' '.join(damaged)} Restore "
            "the files, or start a new run in another --output_dir."
        )
    return None


def check_files(checkpoint: Path) -> None:
    """Raise ValueError if a file of the checkpoint is missing or damaged; the message names it."""
    for name, (size, digest) in read_manifest(checkpoint)["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{checkpoint} is incomplete: {name} is missing.")
        if file.stat().st_size != size or digest_file(file) != digest:
            raise ValueError(f"{file} is corrupt: its content has changed since it was saved.")


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
