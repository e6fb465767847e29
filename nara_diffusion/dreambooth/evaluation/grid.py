"""A sheet of samples: the training images, then for each prompt what it gives before and after, seed beside seed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nara_diffusion.utils.atomic_write import atomic_write

CELL = 128  # side of the square that an image is shown in, in pixels
GAP, MARGIN, TEXT = 4, 16, 15
_COLUMNS_GAP = 24  # between before and after


def write_grid(
    path: Path,
    prompts: Sequence[str],
    columns: dict[str, Sequence[Image.Image]],
    references: Sequence[Image.Image] = (),
) -> None:
    """Writes a PNG.

    Args:
        path: the file.
        prompts: one for each row, drawn above it.
        columns: {title: images}, the images of one prompt after those of another, equally many for each.
        references: images of the subject, for the row on top.
    """
    with atomic_write(path) as partial:
        draw_grid(prompts, columns, references).save(partial)


def draw_grid(
    prompts: Sequence[str], columns: dict[str, Sequence[Image.Image]], references: Sequence[Image.Image] = ()
) -> Image.Image:
    """Draw the sheet that `write_grid` writes."""
    each = {title: len(images) // len(prompts) for title, images in columns.items()}
    widths = {title: _row_width(count) for title, count in each.items()}
    width = max(sum(widths.values()) + _COLUMNS_GAP * (len(columns) - 1), _row_width(min(len(references), 8)))
    captions = [textwrap.wrap(prompt, max(20, width // 8)) for prompt in prompts]
    line = TEXT + GAP
    top = line + CELL + GAP if references else 0
    height = top + line + sum(len(caption) * line + CELL + GAP for caption in captions)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    if references:
        _write(pen, MARGIN, y, "training images")
        _paste_row(sheet, MARGIN, y + line, references[:8])
        y += top
    x = MARGIN
    for title in columns:
        _write(pen, x, y, title)
        x += widths[title] + _COLUMNS_GAP
    y += line
    for row, caption in enumerate(captions):
        for text in caption:
            _write(pen, MARGIN, y, text, fill="dimgray")
            y += line
        x = MARGIN
        for title, images in columns.items():
            _paste_row(sheet, x, y, images[row * each[title] : (row + 1) * each[title]])
            x += widths[title] + _COLUMNS_GAP
        y += CELL + GAP
    return sheet


def _row_width(count: int) -> int:
    return count * (CELL + GAP) - GAP if count else 0


def _paste_row(sheet: Image.Image, x: int, y: int, images: Sequence[Image.Image]) -> None:
    for image in images:
        cell = _fitted(image)
        sheet.paste(cell, (x + (CELL - cell.width) // 2, y + (CELL - cell.height) // 2))
        x += CELL + GAP


def _fitted(image: Image.Image) -> Image.Image:
    """Scaled to fit a cell; small images by whole pixels, so that their own can be seen."""
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)


def _write(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, fill: str = "black") -> None:
    pen.text((x, y), text, fill=fill, font=ImageFont.load_default(TEXT))
