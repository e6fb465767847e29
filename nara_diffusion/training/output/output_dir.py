"""The folder of a run: choosing it, and writing text, JSON and YAML files atomically.

A run never writes into another run's folder, and never leaves a file half-written.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from nara_diffusion.utils.atomic_write import atomic_write

CLAIM = ".claimed"  # the file that a run locks, see `claim`


def check_output_dir(output_dir: str | None, resume_from_checkpoint: str | None = None) -> None:
    """Refuse a folder that can't be written, or that the user named and that holds something, unless it is the run in
    it that is resumed.

    Args:
        resume_from_checkpoint: a checkpoint's folder, or "latest", which is looked for in `output_dir`.

    Raises:
        ValueError: naming what was found and the remedies.
    """
    _check_writable(Path(output_dir or "outputs"))
    if output_dir is None or resume_from_checkpoint == "latest":
        return
    folder = Path(output_dir)
    if resume_from_checkpoint is not None and Path(resume_from_checkpoint).resolve().parent == folder.resolve():
        return
    found = sorted(path.name for path in folder.iterdir() if path.name != CLAIM) if folder.is_dir() else []
    if found:
        raise ValueError(
            f"--output_dir {folder} already holds another run or other files ({', '.join(found[:4])}). Name a fresh "
            "folder, or continue the run in it with --resume_from_checkpoint latest."
        )


def _check_writable(folder: Path) -> None:
    """Try to write in the nearest existing parent of `folder`, before hours of training; nothing stays there."""
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not present.is_dir():
        raise ValueError(f"--output_dir {folder}: {present} is a file: name a folder.")
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} can't be written ({present}: {error.strerror}): name another folder."
        ) from error


def create_output_dir(output_dir: str | None, name: str, root: str | Path = "outputs") -> Path:
    """Create the run's folder: the one that was named, or the first free `root/name-N`."""
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    number = max(numbered_dirs(name, root), default=0) + 1
    while True:
        folder = Path(root) / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run took the number a moment ago
            number += 1
        else:
            return folder


def numbered_dirs(name: str, root: str | Path = "outputs") -> dict[int, Path]:
    """{N: folder} of the folders `name-N` under `root`."""
    found = {}
    for folder in Path(root).glob(f"{name}-*"):
        number = folder.name.removeprefix(f"{name}-")
        if folder.is_dir() and number.isdecimal():
            found[int(number)] = folder
    return found


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, content: Any) -> None:
    """Write `content` as YAML, keys in their own order."""
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
