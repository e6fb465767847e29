"""From an image to training pixels: scale to cover the target, cut it out, mirror; with SDXL's time_ids of just that.

    (H, W) --scale by s = max(h / H, w / W)--> (H', W') --mirror?--> --cut at (top, left)--> (h, w)
    time_ids = (H, W, top, left, h, w)

as in SDXL's training (arXiv 2307.01952, section 2.2): the original size is that of the upright file, top and left are
counted in the scaled, already mirrored image. Scaling and cutting are one resampling, so a long and narrow image never
becomes a giant one on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .buckets import Size


@dataclass(frozen=True)
class Crop:
    """One way to cut `target` out of an image of `original` size.

    Attributes:
        original: (H, W) of the upright image.
        target: (h, w).
        top, left: where the cut begins, in the scaled and mirrored image.
        flip: whether the image is mirrored.
    """

    original: Size
    target: Size
    top: int
    left: int
    flip: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """(H, W, top, left, h, w), what SDXL's UNet is told."""
        return (*self.original, self.top, self.left, *self.target)


def enlargement(original: Size, target: Size) -> float:
    """s: above 1, the image has too few pixels."""
    return max(target[0] / original[0], target[1] / original[1])


def scaled_size(original: Size, target: Size) -> Size:
    """(H', W'): `original` scaled so that it just covers `target`."""
    scale = enlargement(original, target)
    return max(target[0], round(original[0] * scale)), max(target[1], round(original[1] * scale))


def center_crop(original: Size, target: Size, flip: bool = False) -> Crop:
    """The middle of the image."""
    height, width = scaled_size(original, target)
    return Crop(original, target, (height - target[0]) // 2, (width - target[1]) // 2, flip)


def random_crop(original: Size, target: Size, generator: np.random.Generator, flip: bool = False) -> Crop:
    """Uniform over all positions."""
    height, width = scaled_size(original, target)
    top = int(generator.integers(height - target[0] + 1))
    left = int(generator.integers(width - target[1] + 1))
    return Crop(original, target, top, left, flip)


def crop_image(image: Image.Image, crop: Crop) -> Image.Image:
    """The pixels of `crop`, as an image of its target size."""
    height, width = scaled_size(crop.original, crop.target)
    h, w = crop.target
    left = width - w - crop.left if crop.flip else crop.left  # in the image as it is
    x, y = image.width / width, image.height / height
    box = (left * x, crop.top * y, min((left + w) * x, image.width), min((crop.top + h) * y, image.height))
    cut = image.resize((w, h), Image.Resampling.LANCZOS, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else cut


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, h, w) float32 in [−1, 1]."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))  # (h, w, 3) in 0 … 255
    return (values / 127.5 - 1).permute(2, 0, 1).contiguous()
