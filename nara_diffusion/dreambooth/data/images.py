"""Image files as upright 8-bit RGB: what people put into a folder, made alike or refused by name.

EXIF rotation is applied; CMYK, grey, palette and other modes become RGB; 16-bit grey is scaled to 8 bits; what is
transparent becomes white; of an animation the first frame is taken. A file that has an image's name and can't be
decoded to its last row is an error; files with other names are left out.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
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
"""Where Pillow refuses to decode, too: what is larger is taken for a decompression bomb. 512 MiB in RGB."""

_DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error, zlib.error)


class ImageError(ValueError):
    """An image that can't be used; the message names it, and says what to do."""


class _NamedBytes(io.BytesIO):
    """An image's bytes, which Pillow's messages call by its name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name

    def __repr__(self) -> str:
        return self._name


@dataclass(frozen=True)
class ImageSource:
    """An encoded image, somewhere.

    Attributes:
        name: what messages call it.
        fetch: returns the bytes of its file.
    """

    name: str
    fetch: Callable[[], bytes]

    def read(self) -> bytes:
        """The file's bytes. Raises ImageError if it can't be read."""
        try:
            return self.fetch()
        except OSError as error:
            raise ImageError(f"{self.name} can't be read: {error.strerror or error}.") from error

    def load(self) -> Image.Image:
        """The image, upright and RGB. Raises as `load_image`."""
        return decode_image(self.read(), self.name)


def file_source(path: str | Path) -> ImageSource:
    """The image of a file."""
    return ImageSource(str(path), Path(path).read_bytes)


def load_image(path: str | Path) -> Image.Image:
    """The image of a file, upright, in mode RGB.

    Raises:
        ImageError: (a ValueError) no image, a truncated or broken one, more than `MAX_PIXELS`, or values whose range
            nobody knows.
    """
    return file_source(path).load()


def decode_image(content: bytes, name: str, *, warn: bool = False) -> Image.Image:
    """The image of a file's bytes, upright, in mode RGB. Raises as `load_image`.

    Args:
        name: what messages call it.
        warn: say so if frames or pages are left out.
    """
    with _pillow_errors(name), Image.open(_NamedBytes(content, name)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _bomb(name)
        # an MPO is a photo, with a preview or a depth map behind it
        if warn and getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            logger.warning("%s is animated, or has several pages: its first one is taken", name)
        image.load()
        return to_rgb(_upright(image), name)


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """`image` in 8-bit RGB: 16-bit grey scaled, transparency over white.

    Raises:
        ImageError: floating-point or 32-bit values, whose range nobody knows.
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
    taken = set(images)
    return images, [entry for entry in entries if entry not in taken]


def is_image_name(path: Path) -> bool:
    """Whether a file is an image by its name; `._a.jpg` and its like, which some systems leave behind, aren't."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def content_key(content: bytes) -> str:
    """A name for an image's content, by which caches know it."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; broken ones say nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODING_ERRORS:
        return image


def _grey_from_wide(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ImageError(
            f"{name} holds {kind} values (mode {image.mode}), whose range is unknown: save it as 8-bit PNG or JPEG."
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _bomb(name: str) -> ImageError:
    return ImageError(f"{name} has more than {MAX_PIXELS:,} pixels, too many to decode: scale it down, or remove it.")


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Turns what Pillow raises at a bad file into one kind of error with the file's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # broken EXIF and the like
            yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _bomb(name) from error
    except _DECODING_ERRORS as error:
        raise ImageError(
            f"{name} can't be decoded ({type(error).__name__}: {error}): it is truncated, broken or no image. Save it "
            "again as PNG or JPEG, or remove it."
        ) from error
