"""Captions of a folder of images.

The captions come from a metadata.jsonl in the folder, with a line {"file_name": "dog.png", "text":
"a photo of …"} for each image, or from text files next to the images, such as dog.txt for dog.png.
A line for an image that doesn't exist is an error. An image without a caption gets the instance
prompt, which is logged. If there is no instance prompt, a missing caption is an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from nara_diffusion.utils.wording import listed

logger = logging.getLogger(__name__)

METADATA_FILE = "metadata.jsonl"


def check_prompt(prompt: str, name: str) -> str:
    """Return `prompt` stripped of white space. Raise ValueError if nothing is left."""
    if not prompt.strip():
        raise ValueError(f"{name} is empty: say what the images show, as in 'a photo of sks dog'.")
    return prompt.strip()


def own_captions(images: Sequence[Path], column: str | None = None) -> list[str]:
    """Return the captions of the image files of one folder, "" for an image without a caption.

    Args:
        column: the key of captions in metadata.jsonl; None means "text".

    Raises:
        ValueError: a caption can't be read, a line names no image (the message has the file and the
            line), or `column` is given but there is no metadata.jsonl.
    """
    metadata = images[0].parent / METADATA_FILE
    if metadata.exists():
        found = _read_metadata(metadata, column or "text", [image.name for image in images])
        return [found.get(image.name, "") for image in images]
    if column is not None:
        raise ValueError(
            f"caption_column {column!r} is a key of {METADATA_FILE}, but {metadata.parent} has no such file."
        )
    return [_text_beside(image) for image in images]


def fill_captions(captions: Sequence[str], names: Sequence[str], prompt: str | None) -> list[str]:
    """Return `captions` with the instance prompt in place of empty captions.

    Raises:
        ValueError: some captions are empty and there is no prompt.
    """
    captions = [caption.strip() for caption in captions]
    missing = [name for name, caption in zip(names, captions, strict=True) if not caption]
    which = f"{len(missing)} of {len(names)} images ({listed(missing)}) have no caption"
    if missing and prompt is None:
        raise ValueError(
            f"{which}: give --instance_prompt 'a photo of sks dog', or write a caption for each, in "
            f"a .txt file beside it or in {METADATA_FILE}."
        )
    if 0 < len(missing) < len(names):
        logger.warning("%s: they get %r", which, prompt)
    return [caption or check_prompt(str(prompt), "instance_prompt") for caption in captions]


def _read_metadata(path: Path, column: str, images: Sequence[str]) -> dict[str, str]:
    """Return {file_name: caption} for the names in `images`; null means an empty caption."""
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        name, caption = _read_row(line, column, where)
        if name in lines:
            raise ValueError(
                f"{where}: {name} already has a caption in line {lines[name]}: remove one of them."
            )
        if name not in images:
            (near,) = get_close_matches(name.lower(), images, n=1, cutoff=0.0)
            raise ValueError(
                f"{where}: no image of this folder is named {name!r}: write a name that is there, "
                f"such as {near!r}, or remove the line."
            )
        captions[name] = caption
        lines[name] = number
    return captions


def _read_row(line: str, column: str, where: str) -> tuple[str, str]:
    """Return the file_name and the caption in one line."""
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row[column]
    except (ValueError, KeyError, TypeError) as error:
        expected = f'{{"file_name": …, "{column}": …}}'
        raise ValueError(f"{where}: expected {expected}, found {line[:60]} ({error}).") from None
    if caption is None:
        caption = ""
    for key, value in (("file_name", name), (column, caption)):
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: {key!r} is {json.dumps(value)[:60]}, expected a text in quotes."
            )
    return name, caption


def _text_beside(image: Path) -> str:
    """Return the content of the image's text file as one line, or "" if there is no such file."""
    file = image.with_suffix(".txt")
    return " ".join(_read(file).split()) if file.is_file() else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text ({error}): save it as UTF-8.") from None
