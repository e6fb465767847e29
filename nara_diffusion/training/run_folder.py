"""The folder of a run: found, locked, checked; its files.

It is `--output_dir`, the folder of the resumed run, or the next `outputs/NAME-N`.

    .lock           exists while a run writes to the folder
    config.yaml     the arguments
    metrics.jsonl   a line for each logged step
    results.json    written last: the run is complete
    checkpoint-N/   see `checkpoints`
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from nara_diffusion.utils.files import atomic_write
from nara_flags.training import TrainingArguments

from .checkpoints import MANIFEST, check_files, find_checkpoints, latest_undamaged, resume_hint
from .resuming import MAY_CHANGE, changed_arguments, check_same_run

logger = logging.getLogger(__name__)

OUTPUTS = Path("outputs")
LOCK, CONFIG, METRICS, RESULTS = ".lock", "config.yaml", "metrics.jsonl", "results.json"

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Add the file and the checkpoint to resume from to errors of a full or read-only disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        file = error.filename or f"a file in {folder}"
        raise OSError(
            f"{file} can't be written ({error.strerror}). Free some space, or choose another folder. "
            f"{resume_hint(folder)}"
        ) from error


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
    runs: dict[int, Path] = {}
    for path in OUTPUTS.glob(f"{name}-*"):
        number = path.name.removeprefix(f"{name}-")
        if path.is_dir() and number.isdecimal():
            runs[int(number)] = path
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
