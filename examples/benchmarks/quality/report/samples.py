"""A sheet of samples for RESULTS.md: a row a method, a column a prompt, all from the same noise."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nara_diffusion.utils.atomic_write import atomic_write
from quality.report.data import Grid
from quality.report.names import ordered, title
from quality.strips import unpacked

LABELS, GAP, TEXT = 150, 4, 13  # pixels


def samples_sheet(grid: Grid, domain: str, path: Path) -> bool:
    """Writes the samples that the runs on `domain` kept.

    Returns:
        Whether there were any.
    """
    rows = []
    for arm in ordered(grid.arms):
        kept = [r["samples_jpeg"] for r in grid.records(arm) if r["domain"] == domain and r.get("samples_jpeg")]
        rows += [(title(arm), unpacked(kept[0]))] if kept else []
    if not rows:
        return False
    height = max(strip.height for _, strip in rows) + GAP
    sheet = Image.new("RGB", (LABELS + max(strip.width for _, strip in rows), height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, strip) in enumerate(rows):
        y = number * height
        pen.text((GAP, y + strip.height // 2 - TEXT // 2), name, fill="black", font=ImageFont.load_default(TEXT))
        sheet.paste(strip, (LABELS, y))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        sheet.save(partial, "PNG")
    return True
