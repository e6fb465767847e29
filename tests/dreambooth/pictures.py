"""Pictures rendered in the tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Independent random pixels: every crop and scaling differs from every other."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """`folder` with noise of these (width, height) in 00.png, 01.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        noise(width, height, seed=number).save(folder / f"{number:02d}.png")
    return folder
