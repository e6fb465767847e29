"""The folder of a run: `--output_dir`, that of the run that is resumed, or the next `outputs/NAME-N`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from .checkpoints import find_checkpoints

OUTPUTS = Path("outputs")
LOCK = ".lock"


@contextmanager
def claimed_folder(args: Any, name: str, checkpoint: Path | None, is_main: bool) -> Iterator[Path]:
    """The folder, made by the main process and locked: one run at a time writes to it, and a second one is refused
    before it loads anything. A run that wrote nothing leaves no folder.

    Args:
        name: of numbered folders.
        checkpoint: that the run continues from, or None.

    Raises:
        ValueError: another run has it or has left something in it, or it can't be written.
    """
    with ExitStack() as undo:
        answer: list[Any] = [Path(), ""]
        if is_main:
            try:
                answer[0] = _claim(args, name, checkpoint, undo)
            except ValueError as error:
                answer[1] = str(error)
        folder, refusal = broadcast_object_list(answer)
        if refusal:
            raise ValueError(refusal)
        yield folder


def _claim(args: Any, name: str, checkpoint: Path | None, undo: ExitStack) -> Path:
    folder = checkpoint.parent if checkpoint is not None else OUTPUTS / f"{name}-{max(_numbered(name), default=0) + 1}"
    if args.output_dir is not None:
        folder = Path(args.output_dir)
    lock = FileLock(folder / LOCK)
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(exist_ok=True)
            undo.callback(_remove_empty, missing)
        lock.acquire(timeout=0)
    except Timeout:
        if args.output_dir is None and checkpoint is None:  # another run took the number a moment ago
            return _claim(args, name, checkpoint, undo)
        raise ValueError(
            f"--output_dir {folder} is in use by another run: wait for it, or name another folder."
        ) from None
    except OSError as error:
        raise ValueError(f"--output_dir {folder} can't be written ({error.strerror}): name another folder.") from error
    undo.callback(lock.release)
    undo.callback((folder / LOCK).unlink, missing_ok=True)
    if args.output_dir is not None:
        check_output_dir(folder, checkpoint)
    return folder


def check_output_dir(folder: Path, checkpoint: Path | None) -> None:
    """Refuse a folder that holds something, unless it is the run in it that is resumed from `checkpoint`.

    Raises:
        ValueError: naming what was found and the remedies.
    """
    if checkpoint is not None and checkpoint.resolve().parent == folder.resolve():
        return
    if found := sorted(path.name for path in folder.iterdir() if path.name != LOCK):
        raise ValueError(
            f"--output_dir {folder} already holds another run or other files ({', '.join(found[:4])}). Name a fresh "
            "folder, or continue the run in it with --resume_from_checkpoint latest."
        )


def latest_run(args: Any, name: str) -> Path | None:
    """The folder in which `latest` or a bare `checkpoint-N` is looked for: --output_dir, or the newest numbered one
    that holds a checkpoint."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    runs = _numbered(name)
    return next((runs[number] for number in sorted(runs, reverse=True) if find_checkpoints(runs[number])), None)


def _numbered(name: str) -> dict[int, Path]:
    """{N: folder} of the folders `outputs/name-N`."""
    found = {folder.name.removeprefix(f"{name}-"): folder for folder in OUTPUTS.glob(f"{name}-*") if folder.is_dir()}
    return {int(number): folder for number, folder in found.items() if number.isdecimal()}


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
