"""Image files and data sets of the Hub as records: upright RGB images with a caption each.

EXIF rotation is applied, what is transparent becomes white, of an animation the first frame is taken. All images are
decoded once before training starts, so that a broken one shows at once and not at step 3 000. Pixels aren't kept: they
are read again when a crop of them is needed, most often once for the latent cache.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from .captions import METADATA_FILE, check_prompt, fill_captions, own_captions

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""(height, width) in pixels."""
IMAGE_SUFFIXES = frozenset([".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"])


@dataclass(frozen=True)
class ImageRecord:
    """One image of the training data.

    Attributes:
        name: for messages.
        read: returns the bytes of its file.
        size: (H, W), upright.
        prompt: its caption.
        key: a digest of its bytes, for caches.
    """

    name: str
    read: Callable[[], bytes]
    size: Size
    prompt: str
    key: str

    def load(self) -> Image.Image:
        """The image, upright, in mode RGB. Raises ValueError if it can't be decoded."""
        return decode_image(self.read(), self.name)


def load_image(path: str | Path) -> Image.Image:
    """The image of a file, upright, in mode RGB. Raises ValueError if it can't be decoded."""
    return decode_image(Path(path).read_bytes(), str(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """The image of a file's bytes, upright, in mode RGB; `name` is for the ValueError if it can't be decoded."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"mode {image.mode} holds values of an unknown range")
        return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise a dozen classes
        raise ValueError(
            f"{name} can't be decoded ({type(error).__name__}: {error}): save it again as 8-bit PNG or JPEG, or remove "
            "it."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, what is transparent in white."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def image_files(folder: str | Path) -> list[Path]:
    """The image files directly in `folder`, by name; a warning lists what else lies there.

    Raises:
        ValueError: no images, or subfolders as kohya's scripts name them, such as "10_sks dog".
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"the image folder {folder} doesn't exist: name a folder of .png or .jpg files.")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    images = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES]
    known = {folder / METADATA_FILE, folder / "README.md", *(image.with_suffix(".txt") for image in images)}
    others = [entry.name for entry in entries if entry not in images and entry not in known]
    for name in others:
        if re.match(r"\d+_", name) and (folder / name).is_dir():
            raise ValueError(
                f"{folder} holds {name!r}: repeats and a prompt in a folder's name aren't read. Put the images "
                "directly into one folder, and give --instance_prompt."
            )
    if not images:
        found = f", only {', '.join(others[:4])}" if others else ""
        raise ValueError(f"the image folder {folder} holds no images{found}: put .png or .jpg files into it.")
    if others:
        logger.warning("%s: left out what isn't an image: %s", folder, ", ".join(others[:4]))
    return images


def records_from_folder(
    folder: str | Path, *, prompt: str | None = None, caption_column: str | None = None, progress: bool = True
) -> list[ImageRecord]:
    """The images of a folder, by name, with their captions (see `captions`).

    Args:
        prompt: of images without a caption of their own.
        caption_column: the key of captions in metadata.jsonl; None takes "text".

    Raises:
        ValueError: the folder has no images or broken ones (all are named); or a caption is missing or unreadable.
        OSError: the folder can't be read.
    """
    images = image_files(folder)
    captions = fill_captions(own_captions(images, caption_column), [image.name for image in images], prompt)
    return make_records([(str(path), path.read_bytes) for path in images], captions, progress=progress)


def class_records(folder: str | Path, *, prompt: str, progress: bool = True) -> list[ImageRecord]:
    """The class images of prior preservation; all have the class prompt. Raises as `records_from_folder`."""
    sources = [(str(path), path.read_bytes) for path in image_files(folder)]
    return make_records(sources, [check_prompt(prompt, "class_prompt")] * len(sources), progress=progress)


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
    """The "train" split of a data set on the Hub, or of a folder that `datasets` reads, such as its imagefolder.

    Raises:
        ValueError: a column is missing; a broken image; a missing caption.
        Exception: as `datasets.load_dataset`.
    """
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    rows: Any = load_dataset(name, config_name, cache_dir=cache_dir, split="train")
    for column, flag in ((image_column, "image_column"), (caption_column, "caption_column")):
        if column is not None and column not in rows.column_names:
            raise ValueError(f"dataset_name {name} has no {flag} {column!r}, only {', '.join(rows.column_names)}.")
    encoded = rows.cast_column(image_column, ImageColumn(decode=False))
    names = [f"image {number} of {name}" for number in range(1, len(rows) + 1)]
    captions = [None] * len(rows) if caption_column is None else list(rows[caption_column])
    sources = [(label, partial(_read_row, encoded, image_column, number)) for number, label in enumerate(names)]
    return make_records(sources, fill_captions(captions, names, prompt), progress=progress)


def make_records(
    sources: Sequence[tuple[str, Callable[[], bytes]]], prompts: Sequence[str], *, progress: bool = True
) -> list[ImageRecord]:
    """The record of each (name, function that returns its bytes), decoded once for its size and to see it is whole.

    Raises:
        ValueError: naming all images that are broken.
    """
    records, broken = [], []
    bar = tqdm(sources, desc="check images", unit="image", disable=not progress or len(sources) < 50)
    for (name, read), prompt in zip(bar, prompts, strict=True):
        content = read()
        try:
            width, height = decode_image(content, name).size
        except ValueError as error:
            broken.append(str(error))
        else:
            key = hashlib.blake2b(content, digest_size=16).hexdigest()
            records.append(ImageRecord(name, read, (height, width), prompt, key))
    if broken:
        raise ValueError(f"{len(broken)} of {len(sources)} images can't be used:\n" + "\n".join(broken[:8]))
    return records


def _read_row(rows: Any, column: str, number: int) -> bytes:
    """The bytes of an image that `datasets` keeps, in the data set itself or in a file."""
    image = rows[number][column]
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
