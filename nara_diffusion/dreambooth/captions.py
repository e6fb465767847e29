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
TRIGGER = "[trigger]"


def check_prompt(prompt: str, name: str) -> str:
    """Return `prompt` stripped of white space. Raise ValueError if it is empty."""
    if not prompt.strip():
        raise ValueError(
            f"{name} is empty: write what the images show, such as 'a photo of sks dog'."
        )
    return prompt.strip()


def put_trigger(prompt: str, trigger: str | None) -> str:
    """Return `prompt` with the word `trigger` in place of [trigger].

    Raises:
        ValueError: the prompt has [trigger], but there is no word for it.
    """
    if trigger is None and TRIGGER in prompt:
        raise ValueError(
            f"{prompt!r} has {TRIGGER}, but there is no word for it: give --trigger, such as sks."
        )
    return prompt.replace(TRIGGER, trigger or "")


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
        captions = _read_metadata(metadata, column or "text", [image.name for image in images])
        return [captions.get(image.name, "") for image in images]
    if column is not None:
        raise ValueError(
            f"--caption_column {column!r} names a key of {METADATA_FILE}, but {metadata.parent} has no such file: "
            "add it, or leave --caption_column out."
        )
    files = [image.with_suffix(".txt") for image in images]
    return [" ".join(_read(file).split()) if file.is_file() else "" for file in files]


def fill_captions(
    captions: Sequence[str], names: Sequence[str], prompt: str | None, trigger: str | None = None
) -> list[str]:
    """Return `captions` with the instance prompt in place of empty ones, and `trigger` in all.

    Raises:
        ValueError: some captions are empty and there is no prompt, or see `put_trigger`.
    """
    captions = [caption.strip() for caption in captions]
    missing = [name for name, caption in zip(names, captions, strict=True) if not caption]
    share = f"{len(missing)} of {len(names)} images ({listed(missing)}) have no caption"
    if missing and prompt is None:
        raise ValueError(
            f"{share}. Give --instance_prompt 'a photo of sks dog', or write a caption for each of them, in "
            f"a .txt file beside the image or in {METADATA_FILE}."
        )
    if 0 < len(missing) < len(names):
        logger.warning("%s, so they get the instance prompt %r", share, prompt)
    filled = [caption or check_prompt(str(prompt), "instance_prompt") for caption in captions]
    return [put_trigger(caption, trigger) for caption in filled]


def _read_metadata(path: Path, column: str, images: Sequence[str]) -> dict[str, str]:
    """Return {file_name: caption} for the names in `images`; null means an empty caption."""
    captions: dict[str, str] = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row[column] or ""
            if not isinstance(name, str) or not isinstance(caption, str):
                raise TypeError("both must be texts in quotes")
        except (ValueError, KeyError, TypeError) as error:
            expected = f'{{"file_name": "…", "{column}": "…"}}'
            raise ValueError(f"{place}: expected {expected}, got {line[:60]} ({error}).") from None
        if name in captions:
            raise ValueError(f"{place}: a line above already has a caption for {name}. Remove one.")
        if name not in images:
            (near,) = get_close_matches(name.lower(), images, n=1, cutoff=0.0)
            raise ValueError(
                f"{place}: the folder has no image {name!r}. Name one that exists, such as {near!r}, "
                "or remove the line."
            )
        captions[name] = caption
    return captions


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8.") from None
