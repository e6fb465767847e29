"""The folder of a run: found, locked, its files; whether a run can continue a checkpoint exactly.

It is `--output_dir`, the folder of the resumed run, or the next `outputs/NAME-N`.

    .lock           exists while a run writes to the folder
    config.yaml     the arguments
    metrics.jsonl   a line for each logged step
    results.json    written last: the run is complete
    checkpoint-N/   see `checkpoints`
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, load
from filelock import FileLock, Timeout

from nara_diffusion.utils.files import atomic_write
from nara_diffusion.utils.wording import counted
from nara_flags.options import defaults_of
from nara_flags.parser import without_dicts
from nara_flags.training import TrainingArguments

from .checkpoints import (
    MANIFEST,
    check_files,
    find_checkpoints,
    latest_undamaged,
    read_manifest,
)
from .engines import engine_name

logger = logging.getLogger(__name__)

OUTPUTS = Path("outputs")
LOCK, CONFIG, METRICS, RESULTS = ".lock", "config.yaml", "metrics.jsonl", "results.json"


@contextmanager
def claimed_folder(
    args: TrainingArguments, name: str, accelerator: Accelerator
) -> Iterator[tuple[Path, Path | None]]:
    """Create and lock the run's folder; yield it with the checkpoint to continue from, or None.

    Only one run at a time can write to a folder; a second run fails before it loads anything. A run
    that writes nothing leaves no folder behind. `name` is the NAME of numbered folders.

    Raises:
        ValueError: the folder is in use, isn't empty or can't be written to; or the checkpoint is
            missing, damaged, or from a different run.
    """
    with ExitStack() as undo:
        answer: list[Any] = [None, None, ""]
        if accelerator.is_main_process:
            try:
                folder = _lock(args, name, undo)
                checkpoint = _resumed_checkpoint(args, folder)
                if checkpoint is not None:
                    check_same_run(checkpoint, args, accelerator)
                for partial in folder.glob(".partial-*"):  # of a run that was killed while writing
                    shutil.rmtree(partial, ignore_errors=True)
                answer = [folder, checkpoint, ""]
            except (ValueError, OSError, yaml.YAMLError) as error:
                answer[2] = str(error)
        folder, checkpoint, refusal = broadcast_object_list(answer)
        if refusal:
            raise ValueError(refusal)
        yield folder, checkpoint


def _lock(args: TrainingArguments, name: str, undo: ExitStack) -> Path:
    """Create and lock the run's folder. `undo` unlocks it, and deletes the new folders if empty."""
    folder = _run_folder(args, name)
    lock = FileLock(folder / LOCK)
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(exist_ok=True)
            undo.callback(_remove_empty, missing)
        lock.acquire(timeout=0)
    except Timeout:
        if args.output_dir is None and args.resume_from_checkpoint is None:
            return _lock(args, name, undo)  # another run took the number a moment ago
        raise ValueError(
            f"--output_dir {folder} is in use by another run. Wait for it to end, or choose another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} can't be written ({error.strerror}). Choose another folder."
        ) from error
    undo.callback(lock.release)
    undo.callback((folder / LOCK).unlink, missing_ok=True)
    return folder


def _run_folder(args: TrainingArguments, name: str) -> Path:
    """Return the run's folder; for `latest` without --output_dir, the newest with a checkpoint."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    resumed = args.resume_from_checkpoint
    if resumed is not None and len(Path(resumed).parts) > 1:
        return Path(resumed).parent
    runs = {
        int(path.name.removeprefix(f"{name}-")): path
        for path in OUTPUTS.glob(f"{name}-*")
        if path.is_dir() and path.name.removeprefix(f"{name}-").isdecimal()
    }
    if resumed is not None:
        for number in sorted(runs, reverse=True):
            if find_checkpoints(runs[number]):
                return runs[number]
    return OUTPUTS / f"{name}-{max(runs, default=0) + 1}"


def _resumed_checkpoint(args: TrainingArguments, folder: Path) -> Path | None:
    """Return the checkpoint to continue from; None for a new run in an unused folder."""
    resumed = args.resume_from_checkpoint
    if resumed is None:
        _check_empty(folder)
        return None
    if resumed == "latest":
        checkpoint = latest_undamaged(folder)
        if checkpoint is None:
            if not _has_same_start(args, folder):
                _check_empty(
                    folder,
                    "It has no checkpoint to continue from: give the folder of the run, or a new one.",
                )
            logger.info(
                "--resume_from_checkpoint latest: %s has no checkpoint, so the run starts from the beginning",
                folder,
            )
        return checkpoint
    checkpoint = Path(resumed) if len(Path(resumed).parts) > 1 else folder / resumed
    if not (checkpoint / MANIFEST).is_file():
        names = sorted(path.name for path in find_checkpoints(checkpoint.parent))
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is not a checkpoint, since it has no {MANIFEST}. Give a "
            f"checkpoint-N folder ({checkpoint.parent} has {', '.join(names) or 'none'}), or `latest` with the "
            "--output_dir of the run."
        )
    check_files(checkpoint)
    if checkpoint.parent.resolve() != folder.resolve():
        _check_empty(folder)
    return checkpoint


_ANEW = (
    "Choose a new folder, or continue that run with --resume_from_checkpoint latest and the same "
    "arguments."
)


def _check_empty(folder: Path, advice: str = _ANEW) -> None:
    """Raise ValueError, with the names of some files and `advice`, if a folder isn't empty."""
    names = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if names:
        some = ", ".join(names[:4]) + ", …" * (len(names) > 4)
        raise ValueError(
            f"--output_dir {folder} already holds another run or other files ({some}). {advice}"
        )


def _has_same_start(args: TrainingArguments, folder: Path) -> bool:
    """Return True if a run with these arguments began in `folder` but left no checkpoint."""
    if not (folder / CONFIG).is_file() or (folder / RESULTS).exists():
        return False
    saved = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    return isinstance(saved, dict) and not changed_arguments(args, saved).keys() - MAY_CHANGE


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return `values` as the text of a config.yaml, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def drop_later_steps(metrics: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that come after `step` or are incomplete.

    A resumed run repeats the later steps. A killed run may leave an incomplete last line.
    """
    if not metrics.exists():
        return
    lines = metrics.read_bytes().split(b"\n")[:-1]
    with atomic_write(metrics) as partial, partial.open("wb") as file:
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    file.write(line + b"\n")


_LENGTH = (
    "max_train_steps num_train_epochs logging_steps validation_steps checkpointing_steps "
    "checkpoints_total_limit report_to hub_model_id"
)
_EVALUATION = (
    "eval_batch_size generation_steps block_length extract test_file test_samples temperature "
    "cfg_scale top_p remasking confidence_threshold factor entropy_bound cache logits_eos_inf "
    "confidence_eos_eot_inf curve_points sample_batch_size validation_prompts "
    "num_validation_images num_inference_steps guidance_scale identifier similarity_model "
    "alignment_model"
)
_DATA = (
    "dataset_name train_file validation_file validation_samples max_train_samples "
    "dataset_config_name messages_field instruction_field input_field output_field text_field "
    "answer_field max_prompt_length caption_column instance_data_dir instance_prompt "
    "class_data_dir num_class_images validation_data_dir dataset_config trigger source_data_dir "
    "validation_source_dir"
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
        raise ValueError(
            f"{checkpoint} was written by {counted(manifest['processes'], 'process')}, but this run has {processes}. "
            "Each process has its own random states. Launch as many processes, or start a new run from its adapter "
            "with --init_adapter."
        )
    changed = changed_arguments(args, manifest["arguments"])
    if refused := {name: changed[name] for name in changed if name not in MAY_CHANGE}:
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
    differing = [name for name in names if then.get(name) != now.get(name)]
    return {name: (then.get(name), now.get(name)) for name in differing}


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return a description of `changed`, a result of `changed_arguments`."""
    return ", ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
