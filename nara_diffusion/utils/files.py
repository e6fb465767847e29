"""Write files completely or not at all.

A file or folder is written under a temporary name on the same disk and then renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_PARTIAL = ".partial-"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` on success.

    After an error, the temporary file or folder is removed.
    """
    partial = partial_name(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_write_files(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, and move its files into `folder` on success.

    After an error, the files are removed. Other files in `folder` stay. If `folder` does not exist,
    it is created only on success.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=_PARTIAL, dir=folder) as partial:
            yield Path(partial)
            for file in [path for path in Path(partial).rglob("*") if path.is_file()]:
                target = folder / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise ValueError if one of `paths` exists and may not be overwritten."""
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(
                f"'{path}' exists. Choose another name, or pass --overwrite to replace it."
            )


def put_in_place(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`, and delete an existing folder last or restore it on an error."""
    aside = partial_name(path.with_name(f"old-{path.name}"))
    try:
        if path.is_dir():
            shutil.rmtree(aside, ignore_errors=True)  # left by a process killed during deletion
            os.replace(path, aside)
        os.replace(partial, path)
    except BaseException:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def partial_name(path: Path) -> Path:
    """Return the temporary name of `path`, with the same suffix, since writers may depend on it."""
    return path.with_name(f"{_PARTIAL}{path.name}")
