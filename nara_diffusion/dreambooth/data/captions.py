"""Captions come from one prompt for all images, from text files beside the images, or from a metadata.jsonl.

- "prompt": every image has the instance prompt;
- "text_files": `dog.txt` or `dog.caption` beside `dog.png` holds the caption of the latter;
- "metadata": metadata.jsonl, one object a line and one line an image, {"file_name": "dog.png", "text": "a photo of …"};
- "auto": metadata.jsonl if there is one, else text files if there is one, else the prompt.

An image without a caption of its own gets the instance prompt, and the log says so; without an instance prompt it is
an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CAPTION_SOURCES = ("auto", "prompt", "text_files", "metadata")
METADATA_FILE = "metadata.jsonl"
CAPTION_SUFFIXES = (".txt", ".caption")
"""Of text files beside images; kohya's scripts take the second one."""


def captions_for(
    images: Sequence[Path], *, prompt: str | None, source: str = "auto", caption_column: str | None = None
) -> list[str]:
    """The caption of each image file of one folder.

    Args:
        images: the files; at least one.
        prompt: what images without a caption get.
        source: one of `CAPTION_SOURCES`.
        caption_column: the key in metadata.jsonl; none takes "text".

    Raises:
        ValueError: an unknown source, a metadata.jsonl that is missing or broken, says something else than texts or
            two for one image (with the line), no UTF-8, an empty prompt, or images that have neither a caption nor a
            prompt.
    """
    if source not in CAPTION_SOURCES:
        raise ValueError(f"caption_source is {source!r}, expected one of {', '.join(CAPTION_SOURCES)}.")
    metadata = images[0].parent / METADATA_FILE
    if caption_column is not None and not (source in ("auto", "metadata") and metadata.exists()):
        raise ValueError(
            f"caption_column {caption_column!r} is a key of {METADATA_FILE}, from which captions don't come here: put "
            f"that file into {metadata.parent}, or leave caption_column out."
        )
    if source == "metadata" or (source == "auto" and metadata.exists()):
        own = _from_metadata(metadata, caption_column or "text")
        captions, origin = [own.get(image.name, "") for image in images], metadata.name
    elif source == "text_files" or (source == "auto" and have_text_files(images)):
        captions, origin = [_from_text_files(image) for image in images], "a text file"
    else:
        captions, origin = [""] * len(images), ""
    return fill_captions(captions, [image.name for image in images], prompt=prompt, origin=origin)


def have_text_files(images: Sequence[Path]) -> bool:
    """Return whether there is a caption beside one of `images`."""
    return any(image.with_suffix(suffix).exists() for image in images for suffix in CAPTION_SUFFIXES)


def fill_captions(
    captions: Sequence[str | None], names: Sequence[str], *, prompt: str | None, origin: str
) -> list[str]:
    """`captions` with the instance prompt where one is missing or empty; `origin` says where they come from, if at all.

    Raises:
        ValueError: nothing to fill with.
    """
    prompt = check_prompt(prompt, "instance_prompt") if prompt is not None else None
    captions = [(caption or "").strip() for caption in captions]
    missing = [name for name, caption in zip(names, captions, strict=True) if not caption]
    if missing and prompt is None:
        if not origin:
            raise ValueError(
                "no instance_prompt and no captions were given: give --instance_prompt 'a photo of sks dog', or a "
                "caption for each image, in a .txt file beside it or in metadata.jsonl."
            )
        raise ValueError(
            f"{_some(missing, len(names))} have no caption in {origin}: write one for each, or give an instance_prompt "
            "for those."
        )
    if missing and origin:
        logger.warning("%s have no caption in %s: they get %r", _some(missing, len(names)), origin, prompt)
    return [caption or str(prompt) for caption in captions]


def check_prompt(prompt: str, name: str) -> str:
    """`prompt` without white space around it. Raises ValueError if nothing is left."""
    if not prompt.strip():
        raise ValueError(f"{name} is empty: say what the images show, as in 'a photo of sks dog'.")
    return prompt.strip()


def _from_text_files(image: Path) -> str:
    """The caption beside `image`, or none."""
    paths = [path for path in map(image.with_suffix, CAPTION_SUFFIXES) if path.is_file()]
    captions = [" ".join(_read(path).split()) for path in paths]
    if len(set(captions)) > 1:
        said = " and ".join(
            f"{path.name}{' says' if i == 0 else ''} {caption!r}"
            for i, (path, caption) in enumerate(zip(paths, captions, strict=True))
        )
        raise ValueError(f"{image.parent}: {said}: remove one of them.")
    return captions[0] if captions else ""


def _from_metadata(path: Path, column: str) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"captions are to come from {path.name}, but {path.parent} has no such file.")
    captions, lines = {}, {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} breaks at line {number}, column {error.colno}: {error.msg}.") from None
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise ValueError(f"{path}, line {number}: expected an object with a file_name, found {line[:60]}.")
        if column not in record:
            keys = ", ".join(record)
            raise ValueError(
                f"{path}, line {number} has no {column!r}, only {keys}: name its key with --caption_column."
            )
        name, where = record["file_name"], f"{path}, line {number}"
        captions[name] = _checked_caption(record[column], column, where)
        _check_characters(name + captions[name], where)
        if lines.setdefault(name, number) != number:
            raise ValueError(f"{where}: {name} has a caption in line {lines[name]} already: remove one of them.")
    _check_names(path, captions)
    return captions


def _checked_caption(value: Any, column: str, where: str) -> str:
    """A caption of metadata.jsonl; null is an empty one."""
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: {column!r} is {json.dumps(value)[:60]}, expected a text in quotes.")
    return value or ""


def _check_characters(text: str, where: str) -> None:
    """JSON may spell one half of a surrogate pair, which no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{where} holds half a character, {half}: write the character itself.") from None


def _check_names(path: Path, captions: dict[str, str]) -> None:
    """Warns of captions whose image doesn't lie in the folder: most likely a name was mistyped."""
    lost = [name for name in captions if not (path.parent / name).is_file() or "/" in name]
    if lost:
        logger.warning("%s names images that %s doesn't hold: %s", path.name, path.parent, ", ".join(lost[:4]))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text (byte {error.start}: {error.reason}).") from None


def _some(names: Sequence[str], total: int) -> str:
    return f"{len(names)} of {total} images ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
