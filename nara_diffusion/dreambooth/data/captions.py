"""Captions of a folder of images: from its metadata.jsonl, else from .txt files beside the images, else one prompt.

metadata.jsonl has one line an image, {"file_name": "dog.png", "text": "a photo of …"}; `dog.txt` holds the caption of
`dog.png`. An image without a caption of its own gets the instance prompt, and the log says so; without an instance
prompt it is an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

METADATA_FILE = "metadata.jsonl"


def check_prompt(prompt: str, name: str) -> str:
    """`prompt` without white space around it. Raises ValueError if nothing is left."""
    if not prompt.strip():
        raise ValueError(f"{name} is empty: say what the images show, as in 'a photo of sks dog'.")
    return prompt.strip()


def own_captions(images: Sequence[Path], column: str | None = None) -> list[str]:
    """The caption of each image file of one folder, from metadata.jsonl or text files; "" for those without one.

    Args:
        column: the key in metadata.jsonl; None takes "text".

    Raises:
        ValueError: a metadata.jsonl that is broken, has other values than texts, or two lines for one image (with the
            file and the line); a file that isn't UTF-8; `column` without a metadata.jsonl.
    """
    metadata = images[0].parent / METADATA_FILE
    if metadata.exists():
        found = read_metadata(metadata, column or "text")
        return [found.get(image.name, "") for image in images]
    if column is not None:
        raise ValueError(f"caption_column {column!r} is a key of {METADATA_FILE}, which {metadata.parent} lacks.")
    files = [image.with_suffix(".txt") for image in images]
    return [" ".join(_read(file).split()) if file.is_file() else "" for file in files]


def read_metadata(path: Path, column: str) -> dict[str, str]:
    """{file_name: caption} of a metadata.jsonl; null is an empty caption. Raises ValueError as `own_captions`."""
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row[column]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            expected = f'{{"file_name": …, "{column}": …}}'
            raise ValueError(f"{where}: expected {expected}, found {line[:60]} ({error}).") from None
        if not isinstance(caption, str | None):
            raise ValueError(f"{where}: {column!r} is {json.dumps(caption)[:60]}, expected a text in quotes.")
        try:
            f"{name}{caption}".encode()  # JSON may spell one half of a surrogate pair, which no tokenizer takes
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"{where} holds half a character, {half}: write the character itself.") from None
        if name in lines:
            raise ValueError(f"{where}: {name} has a caption in line {lines[name]} already: remove one of them.")
        captions[name], lines[name] = caption or "", number
    return captions


def fill_captions(captions: Sequence[str | None], names: Sequence[str], prompt: str | None) -> list[str]:
    """`captions` with the instance prompt where one is missing or empty.

    Raises:
        ValueError: there is no prompt for those.
    """
    captions = [(caption or "").strip() for caption in captions]
    missing = [name for name, caption in zip(names, captions, strict=True) if not caption]
    which = f"{len(missing)} of {len(names)} images ({', '.join(missing[:4])}) have no caption"
    if missing and prompt is None:
        raise ValueError(
            f"{which}: give --instance_prompt 'a photo of sks dog', or write a caption for each, in a .txt file beside "
            f"it or in {METADATA_FILE}."
        )
    if 0 < len(missing) < len(names):
        logger.warning("%s: they get %r", which, prompt)
    return [caption or check_prompt(str(prompt), "instance_prompt") for caption in captions]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text: {error}") from None
