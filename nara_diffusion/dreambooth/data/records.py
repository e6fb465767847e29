"""The training images as records: where each comes from, its size, and its prompt.

All files are opened and decoded to the end before training starts, so that a broken one shows at once and not at step
3 000. Pixels aren't kept: they are read again when a crop of them is needed, most often once for the latent cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .buckets import Size
from .captions import CAPTION_SUFFIXES, METADATA_FILE, captions_for, check_prompt, fill_captions
from .images import ImageError, ImageSource, content_key, decode_image, file_source, image_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """One image of the training data.

    Attributes:
        source: the file.
        size: (H, W), upright.
        prompt: its caption.
        key: names its content, for caches.
        repeats: how often a pass over the data has it, 1 or more.
    """

    source: ImageSource
    size: Size
    prompt: str
    key: str
    repeats: int = 1


def records_from_folder(
    folder: str | Path,
    *,
    prompt: str | None = None,
    caption_source: str = "auto",
    caption_column: str | None = None,
    minimum: int = 1,
    progress: bool = True,
) -> list[ImageRecord]:
    """The images of a folder, by name, with their captions (see `captions_for`).

    Raises:
        ValueError: the folder is missing, has fewer than `minimum` images, or broken ones (all are named); or a
            caption is missing or unreadable.
    """
    images, others = image_files(folder)
    _report_others(folder, images, others)
    if len(images) < max(minimum, 1):
        raise ValueError(_too_few(folder, images, others, max(minimum, 1)))
    prompts = captions_for(images, prompt=prompt, source=caption_source, caption_column=caption_column)
    return check_sources([file_source(path) for path in images], prompts, progress=progress)


def records_from_dataset(
    name: str,
    *,
    config_name: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    prompt: str | None = None,
    cache_dir: str | None = None,
    progress: bool = True,
) -> list[ImageRecord]:
    """The "train" split of a data set on the Hub, or of a folder that `datasets` reads.

    Raises:
        ValueError: it can't be loaded, lacks a column, is empty; a broken image; a missing caption.
    """
    from datasets import Image, load_dataset

    try:
        rows: Any = load_dataset(name, config_name, cache_dir=cache_dir, split="train")
    except Exception as error:  # whatever `datasets` raises: it has a dozen classes for "not found" alone
        raise ValueError(f"dataset_name {name} can't be loaded: {error}") from error
    for column, flag in ((image_column, "image_column"), (caption_column, "caption_column")):
        if column is not None and column not in rows.column_names:
            raise ValueError(f"dataset_name {name} has no {flag} {column!r}, only {', '.join(rows.column_names)}.")
    if not len(rows):
        raise ValueError(f"dataset_name {name} holds no rows.")
    if not isinstance(rows.features[image_column], Image):
        raise ValueError(f"image_column {image_column!r} of {name} holds no images, but {rows.features[image_column]}.")
    encoded = rows.cast_column(image_column, Image(decode=False))
    names = [f"image {number} of {name}" for number in range(1, len(rows) + 1)]
    captions = [None] * len(rows) if caption_column is None else list(rows[caption_column])
    origin = "" if caption_column is None else f"column {caption_column!r}"
    prompts = fill_captions(captions, names, prompt=prompt, origin=origin)
    sources = [
        ImageSource(label, partial(_read_row, encoded, image_column, number)) for number, label in enumerate(names)
    ]
    return check_sources(sources, prompts, progress=progress)


def class_records(folder: str | Path, *, prompt: str, minimum: int = 1, progress: bool = True) -> list[ImageRecord]:
    """The class images of prior preservation; all have the class prompt.

    Raises:
        ValueError: as `records_from_folder`; fewer than `minimum` images.
    """
    prompt = check_prompt(prompt, "class_prompt")
    return records_from_folder(folder, prompt=prompt, caption_source="prompt", minimum=minimum, progress=progress)


def check_sources(
    sources: Sequence[ImageSource], prompts: Sequence[str], *, progress: bool = True
) -> list[ImageRecord]:
    """Decodes every image once, for its size and to see that it is whole.

    Raises:
        ValueError: naming all that are broken.
    """
    records, broken = [], []
    bar = tqdm(sources, desc="check images", unit="image", disable=not progress or len(sources) < 50)
    for source, prompt in zip(bar, prompts, strict=True):
        try:
            content = source.read()
            width, height = decode_image(content, source.name, warn=True).size
        except ImageError as error:
            broken.append(str(error))
        else:
            records.append(ImageRecord(source, (height, width), prompt, content_key(content)))
    if broken:
        more = f"\n… and {len(broken) - 8} more" if len(broken) > 8 else ""
        head = f"{len(broken)} of {len(sources)} images can't be used:\n" if len(broken) > 1 else ""
        raise ValueError(head + "\n".join(broken[:8]) + more)
    return records


def _read_row(rows: Any, column: str, number: int) -> bytes:
    """The bytes of an image that `datasets` keeps, in the data set itself or in a file."""
    image = rows[number][column]
    if image is None:
        raise OSError("the row has none")
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def _report_others(folder: str | Path, images: list[Path], others: list[Path]) -> None:
    """Names what is left out, captions aside."""
    stems = {image.stem for image in images}
    junk = [
        path.name
        for path in others
        if not (path.suffix in CAPTION_SUFFIXES and path.stem in stems)
        and path.name != METADATA_FILE
        and not path.name.startswith(".")
    ]
    if junk:
        more = ", …" if len(junk) > 4 else ""
        logger.warning("%s: left out %d entries that aren't images: %s%s", folder, len(junk), ", ".join(junk[:4]), more)


def _too_few(folder: str | Path, images: list[Path], others: list[Path], minimum: int) -> str:
    if not images and not others:
        return f"the image folder {folder} is empty: put .png or .jpg files into it."
    if not images:
        found = ", ".join(path.name for path in others[:4])
        return (
            f"the image folder {folder} holds no images, only {found}: put .png or .jpg files directly into it "
            "(HEIC and raw photos have to be converted; subfolders are searched where all are named like '10_sks dog')."
        )
    return f"the image folder {folder} holds {len(images)} images, and {minimum} are needed."
