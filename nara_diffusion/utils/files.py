"""Write files completely or not at all, and identify texts, files and base models by digests.

A file or folder is written under a temporary name on the same disk and then renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub.utils.sha import sha_fileobj
from torch import Tensor

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


def digest_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of `texts` in the given order."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes, in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_base(folders: Mapping[str, Path], variant: str | None = None) -> dict[str, str]:
    """Return {part: digest} for a model's files, one for all weights and one per configuration.

    Args:
        folders: {component: its folder}. The name is empty if the model has no components.
        variant: the variant of the weights to read, such as fp16, or None.
    """
    weights: list[str] = []
    configurations = {}
    for name, folder in folders.items():
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        of_variant = [file for file in files if variant and f".{variant}" in file.stem]
        for file in of_variant or [file for file in files if "." not in file.stem]:
            weights += [name, digest_file(file)]
        for config in ("config.json", "scheduler_config.json"):
            if (folder / config).is_file():
                label = f"base model configuration {Path(name, config).as_posix()}"
                configurations[label] = digest_file(folder / config)
    return {"base model": digest_texts(weights), **configurations}
