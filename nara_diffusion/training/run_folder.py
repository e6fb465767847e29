"""The folder of a run: `--output_dir`, that of the resumed run, or the next `outputs/NAME-N`."""

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

from nara_diffusion.cores.core import NAME_IN_FILES
from nara_diffusion.utils.files import atomic_write

from .arguments import TrainingArguments
from .checkpoints import (
    MANIFEST,
    MAY_CHANGE,
    changed_arguments,
    check_files,
    check_same_run,
    find_checkpoints,
    last_checkpoint,
    latest_whole,
)

OUTPUTS = Path("outputs")
LOCK, CONFIG, METRICS, RESULTS = ".lock", "config.yaml", "metrics.jsonl", "results.json"

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

logger = logging.getLogger(__name__)


@contextmanager
def claimed_folder(
    args: TrainingArguments, name: str, accelerator: Accelerator
) -> Iterator[tuple[Path, Path | None]]:
    """Make and lock the run's folder; yield it with the checkpoint to continue from, or None.

    One run at a time writes to a folder; a second one gets an error before it loads anything. A run
    that wrote nothing leaves no folder. `name` is the NAME of numbered folders.

    Raises:
        ValueError: another run uses the folder or has left something in it, or it can't be written;
            there is no such checkpoint, it is damaged, or belongs to another run.
    """
    with ExitStack() as undo:
        answer: list[Any] = [None, None, ""]
        if accelerator.is_main_process:
            try:
                folder = _lock(args, name, undo)
                answer[:2] = folder, _checkpoint(args, folder)
                if answer[1] is not None:
                    check_same_run(answer[1], args, accelerator)
                    _check_names_in_optimizer(answer[1])
                for left in folder.glob(".partial-*"):  # left by a run killed while writing
                    shutil.rmtree(left, ignore_errors=True)
            except (ValueError, OSError, yaml.YAMLError) as error:
                answer[2] = str(error)
        folder, checkpoint, refusal = broadcast_object_list(answer)
        if refusal:
            raise ValueError(refusal)
        yield folder, checkpoint


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Name the file, and the checkpoint to resume from, in errors of a full or read-only disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        file = error.filename or f"a file in {folder}"
        raise OSError(
            f"{file} can't be written ({error.strerror}): make room, or name another folder. {last_checkpoint(folder)}"
        ) from error


def _lock(args: TrainingArguments, name: str, undo: ExitStack) -> Path:
    folder = _folder_of(args, name)
    lock = FileLock(folder / LOCK)
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(exist_ok=True)
            undo.callback(_remove_empty, missing)
        lock.acquire(timeout=0)
    except Timeout:
        if (
            args.output_dir is None and args.resume_from_checkpoint is None
        ):  # another run took the number a moment ago
            return _lock(args, name, undo)
        raise ValueError(
            f"--output_dir {folder} is in use by another run: wait for it, or name another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} can't be written ({error.strerror}): name another folder."
        ) from error
    undo.callback(lock.release)
    undo.callback((folder / LOCK).unlink, missing_ok=True)
    return folder


def _folder_of(args: TrainingArguments, name: str) -> Path:
    """Return the run's folder. Without --output_dir, `latest` is the newest with a checkpoint."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    if (given := args.resume_from_checkpoint) is not None and len(Path(given).parts) > 1:
        return Path(given).parent
    found = {
        path.name.removeprefix(f"{name}-"): path
        for path in OUTPUTS.glob(f"{name}-*")
        if path.is_dir()
    }
    runs = {int(number): path for number, path in found.items() if number.isdecimal()}
    begun = [
        number for number, path in runs.items() if given is not None and find_checkpoints(path)
    ]
    return runs[max(begun)] if begun else OUTPUTS / f"{name}-{max(runs, default=0) + 1}"


def _checkpoint(args: TrainingArguments, folder: Path) -> Path | None:
    """Return the checkpoint to continue from; None for a new run in an unused folder."""
    given, checkpoint = args.resume_from_checkpoint, None
    if given == "latest":
        if (checkpoint := latest_whole(folder)) is None and not _same_start(args, folder):
            check_empty(
                folder,
                "It has no checkpoint to continue from: name the run's own folder, or a fresh one.",
            )
        if checkpoint is None:
            logger.info(
                "--resume_from_checkpoint latest: %s holds no checkpoint, so the run starts anew",
                folder,
            )
    elif given is not None:
        checkpoint = folder / given if len(Path(given).parts) == 1 else Path(given)
        if not (checkpoint / MANIFEST).is_file():
            present = (
                ", ".join(sorted(path.name for path in find_checkpoints(checkpoint.parent)))
                or "none"
            )
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint} is not a checkpoint: it has no {MANIFEST}. Name a checkpoint-N "
                f"folder ({checkpoint.parent} has {present}), or `latest` with the --output_dir of the run."
            )
        check_files(checkpoint)
    if given != "latest" and (
        checkpoint is None or checkpoint.parent.resolve() != folder.resolve()
    ):
        check_empty(folder)
    return checkpoint


def _check_names_in_optimizer(checkpoint: Path) -> None:
    """Raise ValueError for an optimizer state of FSDP2 that calls the core "nara_core"."""
    files = [*checkpoint.glob("optimizer_*/.metadata"), *checkpoint.glob("optimizer.bin")]
    if any(f"{NAME_IN_FILES}.cores.".encode() in file.read_bytes() for file in files):
        raise ValueError(
            f"{checkpoint} was written by an earlier version, with other names in the optimizer's state: finish the "
            "run with that version, or start a new one from its adapter by --init_adapter."
        )


_ANEW = "Name a fresh folder, or continue the run in it with --resume_from_checkpoint latest and the same arguments."


def check_empty(folder: Path, advice: str = _ANEW) -> None:
    """Raise ValueError, with what was found and `advice`, if a folder isn't empty."""
    if found := sorted(path.name for path in folder.iterdir() if path.name != LOCK):
        what = ", ".join(found[:4]) + ", …" * (len(found) > 4)
        raise ValueError(
            f"--output_dir {folder} already holds another run or other files ({what}). {advice}"
        )


def _same_start(args: TrainingArguments, folder: Path) -> bool:
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
    """Drop the lines of metrics.jsonl after `step`, which a resumed run repeats, and broken lines.

    A killed run may leave its last line broken.
    """
    if not metrics.exists():
        return
    kept: list[bytes] = []
    broken: list[str] = []
    for number, line in enumerate(metrics.read_bytes().split(b"\n")[:-1], 1):
        try:
            is_later = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            broken.append(str(number))
            continue
        if not is_later:
            kept.append(line + b"\n")
    if broken:
        logger.warning("%s: broken lines are dropped (%s)", metrics, ", ".join(broken))
    with atomic_write(metrics) as partial:
        partial.write_bytes(b"".join(kept))
