"""Names and numbers in messages: lists of them, and the folder or repository that a user gave."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError

FILE_SUFFIXES = frozenset([".bin", ".ckpt", ".gguf", ".pt", ".pth", ".safetensors"])
"""Suffixes of weight files; no repository's name has them."""


def listed(names: Collection[str], kind: str = "") -> str:
    """Return the first three of `names`, quoted, and the number of the others, by their `kind`."""
    shown = ", ".join(f"'{name}'" for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more {kind}".rstrip()


def counted(number: int, what: str) -> str:
    """Return a number with its noun: "1 prompt", "4 prompts", "2 processes"."""
    return (
        f"{number} {what}"
        if number == 1
        else f"{number} {what}{'es' if what.endswith('s') else 's'}"
    )


def refuse_file(
    source: str | Path, kind: str, remedy: str = "name the folder that it lies in."
) -> None:
    """Raise ValueError if `source` names a file, not a folder or repository of `kind`."""
    path = Path(source)
    if path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir()):
        raise ValueError(
            f"'{source}' is the name of a file, expected a folder or a repository with {kind}: {remedy}"
        )


@contextmanager
def naming_source(
    source: str | Path, file: str, kind: str, remedy: str = "name the folder that it lies in."
) -> Iterator[None]:
    """Explain errors inside the context, which fetches `file` of `kind` ("a model").

    `source` is the folder or repository as the user named it.

    Raises:
        ValueError: `source` is a file (the message has the `remedy`); a folder has no such file; or
            there is no folder, and no repository was reached.
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
    """Return True if a download failed because the Hub wasn't reached.

    Diffusers reports that as a missing file.
    """
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None
