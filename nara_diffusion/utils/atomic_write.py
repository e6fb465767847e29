"""Files and folders that are whole or absent: everything goes to a temporary name on the same disk first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `folder` that becomes `folder` at the end, or vanishes on any error."""
    partial = partial_name(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def atomic_write_files(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder whose files move into `folder` at the end, or vanish on any error.

    What else is in `folder` stays. It is made if need be, and then is there only if all went well.
    """
    made = not folder.exists()
    partial = partial_name(folder / f"files-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in [path for path in partial.rglob("*") if path.is_file()]:
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    except BaseException:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, folder: Path) -> None:
    """Let `partial` become `folder`. What was there is deleted last, and comes back on an error."""
    aside = partial_name(folder.with_name(f"old-{folder.name}"))
    try:
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed while it deleted it
            os.replace(folder, aside)
        os.replace(partial, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Deletes `folder`; what is left of it, if that fails midway, no longer has its name."""
    aside = partial_name(folder)
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    os.replace(folder, aside)
    shutil.rmtree(aside)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that becomes `path` at the end, or vanishes on any error."""
    partial = partial_name(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path) -> Path:
    """The name under which `path` is written; the suffix stays last, since some writers choose their format by it."""
    return path.with_name(f".partial-{path.name}")
