"""Pictures of a subject and of its class for training steps."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three pictures in `instance` and four in `class`."""
    generator = np.random.default_rng(3)
    for name, count in (("instance", 3), ("class", 4)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = generator.integers(0, 256, (22, 26, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path
