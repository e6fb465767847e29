"""Pipelines with a LoRA or a NaRA from a file, for the tests of strengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nara_diffusion import StrengthSchedule
from tests.helpers.small_pipelines import small_sdxl

KINDS = pytest.mark.parametrize("kind", ["LoRA", "DoRA", "NaRA", "NaRA-DoRA"])
DROP = StrengthSchedule([(0.5, 1.3), (0.5, 0.0)])


def loaded(folder: Path, kind: str, pipe: Any = None, name: str = "toy") -> Any:
    pipe = small_sdxl() if pipe is None else pipe
    (pipe.load_nara_weights if kind.startswith("NaRA") else pipe.load_lora_weights)(folder, adapter_name=name)
    return pipe
