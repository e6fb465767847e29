"""Write files completely or not at all, compute digests, and word messages with names and counts.

A file or folder is written under a temporary name on the same disk and then renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils.sha import sha_fileobj

_PARTIAL = ".partial-"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` on success.

    After an error, the temporary file or folder is removed. An OSError without a file name, as on a
    full disk, gets the name `path`.
    """
    partial = partial_name(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException as error:
        _name_target(error, partial, path)
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


def _name_target(error: BaseException, partial: Path, path: Path) -> None:
    """Set an OSError's file name to `path` if it has none or names a file in `partial`."""
    if not isinstance(error, OSError) or error.errno is None:
        return
    if error.filename is None or str(error.filename).startswith(str(partial)):
        error.filename = str(path)


@contextmanager
def atomic_write_files(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, and move its files into `folder` on success.

    After an error, the files are removed. Other files in `folder` stay. If `folder` does not exist,
    it is created only on success.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=_PARTIAL, dir=folder) as partial:
            yield Path(partial)
            for file in [path for path in Path(partial).rglob("*") if path.is_file()]:
                target = folder / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except BaseException as error:
        _name_target(error, folder / _PARTIAL, folder)
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise ValueError if one of `paths` exists and may not be overwritten."""
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(
                f"'{path}' exists: choose another name, or pass --overwrite to replace it."
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


def delete_folder(folder: Path) -> None:
    """Delete `folder`, renaming it first so that a failure leaves no partial folder of its name."""
    aside = partial_name(folder)
    shutil.rmtree(aside, ignore_errors=True)  # left by a killed process
    os.replace(folder, aside)
    shutil.rmtree(aside)


def partial_name(path: Path) -> Path:
    """Return the temporary name of `path`, with the same suffix, since writers may depend on it."""
    return path.with_name(f"{_PARTIAL}{path.name}")


# ---------------------------------------------------------------------- files that users name

FILE_SUFFIXES = frozenset([".bin", ".ckpt", ".gguf", ".pt", ".pth", ".safetensors"])
"""Suffixes of weight files; no repository's name has them."""


def refuse_file(
    source: str | Path, kind: str, remedy: str = "name the folder that it lies in."
) -> None:
    """Raise ValueError if `source` is a file instead of a folder or repository of `kind`."""
    path = Path(source)
    if path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir()):
        raise ValueError(
            f"'{source}' is the name of a file, expected a folder or a repository with {kind}: {remedy}"
        )


@contextmanager
def naming_source(
    source: str | Path, file: str, kind: str, remedy: str = "name the folder that it lies in."
) -> Iterator[None]:
    """Explain errors raised inside the context, which fetches `file` of `kind` ("a model").

    `source` is the folder or repository that the user named.

    Raises:
        ValueError: `source` is a file (the message includes the `remedy`); the folder has no such
            file; or there is no such folder, and no repository could be reached.
    """
    refuse_file(source, kind, remedy)
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(source, file).is_file():
            raise
        if Path(source).is_dir():
            raise ValueError(
                f"There is no '{file}' in the folder '{source}': name a folder of {kind}."
            ) from error
        reason = f"{kind} in a repository of that name was not reached: {str(error).strip().partition(chr(10))[0]}"
        if is_out_of_reach(error):
            reason = (
                "the Hub, for a repository of that name, can't be reached: look at the connection, or "
                "name a folder."
            )
        raise ValueError(f"There is no folder '{source}', and {reason}") from error


def is_out_of_reach(error: BaseException | None) -> bool:
    """Return whether a download failed because the Hub could not be reached.

    Diffusers reports this case as a missing file.
    """
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


# ---------------------------------------------------------------------- what identifies files


def digest_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of `texts` in the given order."""
    found = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogatepass")
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def digest_base(folders: Mapping[str, Path], variant: str | None = None) -> dict[str, str]:
    """Return {part: digest} for a model's files, one for all weights and one per configuration.

    Args:
        folders: {component: its folder}. The name is empty if the model has no components.
        variant: the variant of the weights to read, such as fp16, or None.
    """
    weights = [
        (name, file) for name, folder in folders.items() for file in _weight_files(folder, variant)
    ]
    found = {
        "base model": digest_texts(
            text for name, file in weights for text in (name, digest_file(file))
        )
    }
    for name, folder in folders.items():
        for file in (folder / config for config in ("config.json", "scheduler_config.json")):
            if file.is_file():
                found[f"base model configuration {Path(name, file.name).as_posix()}"] = digest_file(
                    file
                )
    return found


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    named = [file for file in files if variant and f".{variant}" in file.stem]
    return named or [file for file in files if "." not in file.stem]


def local_folder(name: str, *, revision: str | None = None) -> Path:
    """Return the folder of a loaded model, which is `name` or its local copy from the Hub."""
    return Path(
        name
        if Path(name).is_dir()
        else snapshot_download(name, revision=revision, local_files_only=True)
    )


# ---------------------------------------------------------------------- lists and numbers


def listed(names: Collection[str], kind: str = "") -> str:
    """Return text with the first three `names`, quoted, and the number of others of that `kind`."""
    shown = ", ".join(f"'{name}'" for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more {kind}".rstrip()


def counted(number: int, what: str) -> str:
    """Return a number with its noun: "1 prompt", "4 prompts", "2 processes"."""
    return (
        f"{number} {what}"
        if number == 1
        else f"{number} {what}{'es' if what.endswith('s') else 's'}"
    )
