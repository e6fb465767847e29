"""Masks of images, which weight the squared errors of their pixels.

    w = max(mean of the mask over a latent's pixels, floor),    white = 1, black = 0
    loss = mean of w · (prediction − target)²

The mean is over all latents, also those outside the mask, as in kohya's scripts and OneTrainer. A
mask is a grey image in the folder `mask` beside its image, with the same name, or the image's alpha
channel. An image without a mask has w = 1.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from nara_diffusion.utils.wording import counted

from .image_records import MASK_FOLDER, ImageRecord, files_of_images, make_records

logger = logging.getLogger(__name__)


def with_masks(
    records: Sequence[ImageRecord], folder: str | Path, *, from_alpha: bool = False
) -> list[ImageRecord]:
    """Return the records of the images in `folder`, with their masks.

    Args:
        from_alpha: take the alpha channel of images that have one, but no file in the mask folder.

    Raises:
        ValueError: a mask has another size than its image, or no image, or can't be read; or
            `from_alpha` is set, but there are no masks.
    """
    files: dict[str, Path] = {}
    place = Path(folder) / MASK_FOLDER
    if place.is_dir():
        files = files_of_images(place, [record.name for record in records])
    masked: list[ImageRecord] = []
    sources: list[tuple[str, Callable[[], bytes]]] = []
    for record in records:
        file = files.get(Path(record.name).stem)
        if file is not None:
            sources.append((str(file), file.read_bytes))
        elif from_alpha and _upright(record.read).has_transparency_data:
            read = partial(alpha_channel, record.read)
            sources.append((f"the alpha channel of {record.name}", read))
        else:
            continue
        masked.append(record)
    if from_alpha and not masked:
        raise ValueError(
            f"--alpha_mask is set, but no image in {folder} has an alpha channel: leave it out."
        )
    if not masked:
        return list(records)
    masks: dict[str, ImageRecord] = {}
    for record, mask in zip(masked, make_records(sources, [""] * len(sources)), strict=True):
        if mask.size != record.size:
            raise ValueError(
                f"{mask.name} is {mask.size[1]} x {mask.size[0]} pixels, but its image {record.size[1]} x "
                f"{record.size[0]}: save both in one size."
            )
        masks[record.name] = mask
    count = counted(len(records), "image")
    logger.info("%s: %d of %s have a mask; the others weigh 1", folder, len(masks), count)
    return [replace(record, mask=masks.get(record.name)) for record in records]


def alpha_channel(read: Callable[[], bytes]) -> bytes:
    """Return the alpha channel of the image that `read` returns, as a PNG file."""
    file = io.BytesIO()
    _upright(read).convert("RGBA").getchannel("A").save(file, format="PNG")
    return file.getvalue()


def _upright(read: Callable[[], bytes]) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(read())))
