"""The folder checkpoint-N: all that a run needs to continue exactly after step N.

    checkpoint-N/adapter_config.json,        the adapter, written by the run's `Writer`
                 adapter_model.safetensors
                 optimizer.bin,              as accelerate writes them; scaler.pt only with fp16;
                 scheduler.bin, scaler.pt    see `engine_state` for the optimizer's form
                 random_states_P.pkl         the random states of process P
                 checkpoint.json             the manifest: step, length of the schedule, losses not
                                             yet logged, number of processes, engine, arguments,
                                             digests of files, data, base and the manifest itself

The step is enough to find the place in the data, since their order in `utils.data_order` depends
only on (seed, position). A checkpoint contains neither the data nor the frozen base model, but
records the digests of both. A checkpoint is written under a temporary name and renamed when it is
complete. Only then are older checkpoints deleted.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load

from nara_diffusion.utils.digests import digest_file
from nara_diffusion.utils.files import atomic_write_files, delete_folder, partial_name, put_in_place
from nara_diffusion.utils.wording import counted
from nara_flags.options import defaults_of
from nara_flags.parser import without_dicts
from nara_flags.training import TrainingArguments

from .engine_state import save_state, trained_state
from .engines import engine_name, global_batch

logger = logging.getLogger(__name__)

Writer = Callable[[Any, Path, dict[str, Any]], None]
"""Write an adapter's files: (model without wrappers, folder, the model's state dict) → None."""

MANIFEST = "checkpoint.json"
FORMAT = 2
_FIELDS = {"step", "total_steps", "data_start", "unlogged", "batch", "processes", "engine"}
_FIELDS |= {"arguments", "digests", "written", "files"}

_LENGTH = (
    "max_train_steps num_train_epochs logging_steps validation_steps checkpointing_steps "
    "checkpoints_total_limit report_to hub_model_id"
)
_EVALUATION = (
    "eval_batch_size generation_steps block_length extract test_file test_samples temperature "
    "cfg_scale top_p remasking confidence_threshold factor entropy_bound logits_eos_inf "
    "confidence_eos_eot_inf curve_points sample_batch_size validation_prompts "
    "num_validation_images num_inference_steps guidance_scale identifier similarity_model "
    "alignment_model"
)
_DATA = (
    "dataset_name train_file validation_file validation_samples max_train_samples "
    "dataset_config_name messages_field instruction_field input_field output_field text_field "
    "answer_field max_prompt_length caption_column instance_data_dir instance_prompt "
    "class_data_dir num_class_images validation_data_dir"
)
_PLACES = "pretrained_model_name_or_path pretrained_vae_model_name_or_path init_adapter core_module"
MAY_CHANGE = frozenset(f"{_LENGTH} {_EVALUATION} {_DATA} {_PLACES}".split())
"""Arguments that may change when a run resumes.

The data and the base model are checked by their digests: changed data start again from the
beginning, and a changed base model is an error. All arguments that aren't in this set define what
is trained, or how.
"""

_BEFORE = {"group_by_length": False}
"""Options that earlier versions didn't have, where they acted otherwise than the present default."""


# ---------------------------------------------------------------- the manifest


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
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is missing or corrupt ({error}).") from error
    if version != FORMAT:
        raise ValueError(
            f"{checkpoint} was written by version 0.1, and this version can't continue it. Finish the run with 0.1, "
            "or start a new run from its adapter with --init_adapter."
        )
    if missing := sorted(_FIELDS - manifest.keys()):
        raise ValueError(f"{path} is corrupt: it has no {', '.join(missing)}.")
    return manifest


# ---------------------------------------------------------------- writing


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
            files = {}
            for path in sorted(path for path in partial.rglob("*") if path.is_file()):
                name = path.relative_to(partial).as_posix()
                files[name] = path.stat().st_size, digest_file(path)
            manifest = {"format": FORMAT, **facts, "written": time.time(), "files": files}
            write_manifest(partial, manifest)
            put_in_place(partial, target)
            older = [path for path in find_checkpoints(target.parent) if path != target]
            for path in [] if limit is None else older[: max(0, len(older) + 1 - limit)]:
                logger.info("deleting %s (--checkpoints_total_limit %d)", path, limit)
                delete_folder(path)
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


# ---------------------------------------------------------------- finding


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
            continue
        if damaged:
            logger.warning("%s Resuming from the previous checkpoint.", " ".join(damaged))
        return path
    if damaged:
        raise ValueError(
            f"--resume_from_checkpoint latest: all checkpoints in {folder} are damaged. {' '.join(damaged)} Restore "
            "the files, or start a new run in another --output_dir."
        )
    return None


# ---------------------------------------------------------------- checking


def check_files(checkpoint: Path) -> None:
    """Raise ValueError if a file of the checkpoint is missing or damaged; the message names it."""
    for name, (size, digest) in read_manifest(checkpoint)["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{checkpoint} is incomplete: {name} is missing.")
        if file.stat().st_size != size or digest_file(file) != digest:
            raise ValueError(f"{file} is corrupt: its content has changed since it was saved.")


def check_same_run(checkpoint: Path, args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise ValueError if this run can't continue a checkpoint bit for bit.

    The message says which engine, number of processes or arguments differ.
    """
    manifest = read_manifest(checkpoint)
    engine, processes = engine_name(accelerator), accelerator.num_processes
    if manifest["engine"] != engine:
        raise ValueError(
            f"{checkpoint} was written under {manifest['engine']} and this run is under {engine}. They store the "
            "optimizer differently. Launch the run with the first."
        )
    if manifest["processes"] != processes:
        reason, batch = "Each process has its own random states", global_batch(accelerator, args)
        if manifest["batch"] != batch:
            reason = f"The global batch would be {batch} instead of {manifest['batch']}"
        raise ValueError(
            f"{checkpoint} was written by {counted(manifest['processes'], 'process')}, but this run has {processes}. "
            f"{reason}. Launch as many processes, or start a new run from its adapter with --init_adapter."
        )
    changed = changed_arguments(args, manifest["arguments"])
    refused = {name: values for name, values in changed.items() if name not in MAY_CHANGE}
    if refused:
        raise ValueError(
            f"{checkpoint} belongs to a run with other arguments ({describe_changes(refused)}). Give the same "
            f"arguments (--config {checkpoint.parent / 'config.yaml'} has them), or start a new run from its adapter "
            "with --init_adapter."
        )


def check_random_states(checkpoint: Path, process: int) -> None:
    """Raise ValueError unless `load_state` has restored the random generators of this process.

    accelerate silently skips states that it can't load. It restores the generators of Python,
    NumPy, PyTorch and CUDA in this order, so checking the last of them is enough.
    """
    file = checkpoint / f"random_states_{process}.pkl"
    try:
        saved = load(file)
        pairs = [(saved["torch_manual_seed"], torch.get_rng_state())]
        if torch.cuda.is_available():
            pairs += zip(
                saved["torch_cuda_manual_seed"], torch.cuda.get_rng_state_all(), strict=True
            )
    except Exception as error:  # unpickling may raise anything
        raise ValueError(
            f"{file} can't be read ({error}). Resume from another checkpoint."
        ) from error
    if not all(torch.equal(then.cpu(), now.cpu()) for then, now in pairs):
        raise ValueError(
            f"{file} doesn't restore the random states, so dropout would differ. Were they saved on other devices?"
        )


def warn_of_pickles(checkpoint: Path, engine: str) -> None:
    """Log a warning if resuming under `engine` (see `engine_name`) unpickles files."""
    if engine not in ("one process or DDP", "FSDP2 with FULL_STATE_DICT"):  # read with weights_only
        logger.warning(
            "%s: %s stores its state in pickles, and resuming runs the code in them. Resume only from checkpoints "
            "that you or people you trust have written.",
            checkpoint,
            engine,
        )


def changed_arguments(
    args: TrainingArguments, saved: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return {name: (saved value, current value)} of the arguments that differ from `saved`.

    `saved` may be the arguments of an earlier version. An option that it lacks had its present
    default, or its value in `_BEFORE`. An option that no longer exists counts as changed if it was
    on, since the resumed run would not have it. The arguments output_dir and resume_from_checkpoint
    are ignored.
    """
    now = vars(args)
    then = defaults_of(args) | _BEFORE | without_dicts(saved)
    gone = {name for name, value in then.items() if name not in now and value not in (None, False)}
    names = sorted((now.keys() | gone) - {"output_dir", "resume_from_checkpoint"})
    pairs = {name: (then.get(name), now.get(name)) for name in names}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return a description of `changed`, a result of `changed_arguments`."""
    return ", ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
