"""Aspect-ratio buckets: the few sizes (h, w) to which images are brought, so that a batch has one size.

Each image goes to the bucket whose ratio h / w is nearest to its own, by |ln(h_i / w_i) − ln(h_b / w_b)|: then as
little as possible is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels."""


def make_buckets(resolution: int, *, divisor: int = 64, max_ratio: float = 2.0) -> list[Size]:
    """Sizes of at most resolution² pixels whose sides are multiples of `divisor`, from 1 : max_ratio to max_ratio : 1.

    For each height, the widest bucket that fits. For SDXL's 1024 these are 832 × 1216, 896 × 1152, 1024 × 1024, ….

    Raises:
        ValueError: `resolution` is no multiple of `divisor`, or max_ratio is below 1.
    """
    check_size((resolution, resolution), divisor)
    if max_ratio < 1:
        raise ValueError(f"max_ratio is {max_ratio}, expected 1 or more.")
    sizes = set()
    for height in range(divisor, int(resolution * math.sqrt(max_ratio)) + 1, divisor):
        width = min(resolution**2 // height, int(height * max_ratio)) // divisor * divisor
        if width and height <= width * max_ratio:
            sizes |= {(height, width), (width, height)}
    return sorted(size for size in sizes if not any(_within(size, other) for other in sizes - {size}))


def parse_buckets(text: str, *, divisor: int = 8) -> list[Size]:
    """Buckets as diffusers' scripts write them: "832,1216;1024,1024;1216,832", each height,width.

    Raises:
        ValueError: something else, or sides that aren't multiples of `divisor`.
    """
    sizes = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        sides = part.split(",")
        if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
            raise ValueError(f"the bucket {part!r} isn't height,width: write buckets as 832,1216;1024,1024.")
        sizes.append((int(sides[0]), int(sides[1])))
        check_size(sizes[-1], divisor)
    if not sizes:
        raise ValueError("no buckets were given: write them as 832,1216;1024,1024.")
    return sorted(set(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose ratio is nearest to that of an image of `size`; of two equally near ones the larger."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - ratio), 9), -b[0] * b[1], b))


def _within(size: Size, other: Size) -> bool:
    return size[0] <= other[0] and size[1] <= other[1]


def check_size(size: Size, divisor: int) -> None:
    """Refuses a size that the autoencoder and the UNet can't halve often enough."""
    if min(size) < divisor or size[0] % divisor or size[1] % divisor:
        raise ValueError(
            f"a training size of {size[0]} x {size[1]} pixels doesn't fit this model: both sides have to be multiples "
            f"of {divisor}."
        )
