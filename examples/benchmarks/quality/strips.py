"""Pictures in a record: a row of equal images as one JPEG, in base64, so that a report needs the records alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

QUALITY = 90  # of JPEG


def packed(images: Sequence[Image.Image]) -> str:
    """`images`, all of one size, beside each other."""
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for index, image in enumerate(images):
        strip.paste(image, (index * width, 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return base64.b64encode(file.getvalue()).decode("ascii")


def unpacked(text: str) -> Image.Image:
    """The row that `packed` made."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
