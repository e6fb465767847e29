"""Tiny models and data on disk, for `nara-check`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.small_pipelines import small_sdxl

LLADA = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny"


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    small_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(3):
        blocks = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((20, 24), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "train.jsonl"
    texts = ["".join(chr(97 + (i * j) % 26) for j in range(3 + i % 4)) for i in range(1, 25)]
    lines = [{"instruction": f"upper: {text}", "output": text.upper(), "answer": text.upper()} for text in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
