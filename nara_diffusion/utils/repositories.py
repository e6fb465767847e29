"""The folder or the repository on the Hub that a user names: its local copy, and errors about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

_WEIGHTS = (".bin", ".ckpt", ".gguf", ".pt", ".pth", ".safetensors")
"""Suffixes of weight files; no repository's name has them."""


def refuse_file(
    source: str | Path, kind: str, remedy: str = "Give the folder that contains it."
) -> None:
    """Raise ValueError if `source` is a file instead of a folder or repository of `kind`."""
    path = Path(source)
    if path.is_file() or (path.suffix in _WEIGHTS and not path.is_dir()):
        raise ValueError(
            f"'{source}' is the name of a file, expected a folder or a repository with {kind}. {remedy}"
        )


@contextmanager
def naming_source(
    source: str | Path, file: str, kind: str, remedy: str = "Give the folder that contains it."
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
                f"There is no '{file}' in the folder '{source}'. Give a folder of {kind}."
            ) from error
        if is_out_of_reach(error):
            raise ValueError(
                f"'{source}' is not a local folder, and the Hub can't be reached to look for a repository with that "
                "name. Check your connection, or pass a local folder."
            ) from error
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"'{source}' is not a local folder, and loading {kind} from a repository with that name failed: {reason}"
        ) from error


def is_out_of_reach(error: BaseException | None) -> bool:
    """Return whether a download failed because the Hub could not be reached.

    Diffusers reports this case as a missing file.
    """
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


def local_folder(name: str, *, revision: str | None = None) -> Path:
    """Return the folder of a loaded model, which is `name` or its local copy from the Hub."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, local_files_only=True))
