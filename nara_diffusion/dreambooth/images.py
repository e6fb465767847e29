"""Image files as upright 8-bit RGB: what people put into a folder, made alike or refused by name.

EXIF rotation is applied; CMYK, grey, palette and other modes become RGB; 16-bit grey is scaled to 8 bits; what is
transparent becomes white; of an animation the first frame is taken. A file that has an image's name and can't be
decoded to its last row is an error, other files are left out.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    (
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)
"""Files with one of these names are taken for images."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit on a decoded image: what is larger is taken for a decompression bomb."""

_DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error, MemoryError)


@dataclass(frozen=True)
class ImageSource:
    """One image file, or the bytes of one.

    Attributes:
        name: what messages call it.
        path: the file, or None.
        content: its bytes where there is no file.
    """

    name: str
    path: str | None = None
    content: bytes | None = None

    def read(self) -> bytes:
        """The file's bytes."""
        if self.content is not None:
            return self.content
        assert self.path is not None
        return Path(self.path).read_bytes()

    def load(self) -> Image.Image:
        """The image, upright and RGB; see `load_image`."""
        return decode_image(self.read(), self.name)


def load_image(path: str | Path) -> Image.Image:
    """The image of a file, upright, in mode RGB.

    Raises:
        ValueError: no image, a truncated or broken one, more than `MAX_PIXELS`, or a mode that isn't a picture.
    """
    return ImageSource(str(path), str(path)).load()


def decode_image(content: bytes, name: str) -> Image.Image:
    """The image of a file's bytes, upright, in mode RGB; `name` is what messages call it. Raises as `load_image`."""
    with _pillow_errors(name), Image.open(io.BytesIO(content)) as image:
        if getattr(image, "n_frames", 1) > 1:
            logger.warning("%s is animated or has several pages: its first frame is taken", name)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), name)


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """`image` in 8-bit RGB: 16-bit grey scaled, transparency over white.

    Raises:
        ValueError: floating-point or 32-bit values, whose range nobody knows.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_wide(image, name).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def image_files(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """(image files, what else lies in the folder), by name. Subfolders aren't entered; hidden files are never images.

    Raises:
        ValueError: there is no such folder, or it can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "doesn't exist"
        raise ValueError(f"the image folder {folder} {kind}: name a folder of .png or .jpg files.")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"the image folder {folder} can't be read: {error.strerror}.") from error
    images = [entry for entry in entries if is_image_name(entry) and entry.is_file()]
    return images, [entry for entry in entries if entry not in set(images)]


def is_image_name(path: Path) -> bool:
    """Whether a file is an image by its name; `._a.jpg` and its like, which some systems leave behind, aren't."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def content_key(content: bytes) -> str:
    """A name for an image's content, by which caches know it."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _grey_from_wide(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"{name} holds {'floating-point' if image.mode == 'F' else '32-bit'} values (mode {image.mode}), whose "
            "range is unknown: save it as 8-bit PNG or JPEG."
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Turns what Pillow raises at a bad file into one kind of error with the file's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # between half the limit and the limit
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # broken EXIF and the like
            yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} has more than {MAX_PIXELS:,} pixels, which a file can claim to fill the memory: scale it down."
        ) from error
    except _DECODING_ERRORS as error:
        if name in str(error):
            raise
        raise ValueError(
            f"{name} can't be decoded ({type(error).__name__}: {error}): it is truncated, broken or no image. Save it "
            "again as PNG or JPEG, or remove it."
        ) from error
