"""Pictures rendered in the tests: each pixel's colour tells where it is, so a crop can be read off its own pixels."""

from pathlib import Path

import numpy as np
from PIL import Image


def gradient(width: int, height: int, blue: int = 90) -> Image.Image:
    """Red grows from left to right, green from top to bottom, both from 0 to 255."""
    pixels = np.full((height, width, 3), blue, dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round().astype(np.uint8)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height).round().astype(np.uint8)[:, None]
    return Image.fromarray(pixels)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Independent random pixels: every crop and scaling differs from every other."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """`folder` with noise of these (width, height) in 00.png, 01.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        noise(width, height, seed=number).save(folder / f"{number:02d}.png")
    return folder
