"""What the tests of strengths share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.loaders.adapters import save_lora, trained


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("LoRA", "DoRA", "NaRA", "NaRA-DoRA"):
        found[kind] = folder = tmp_path_factory.mktemp(kind)
        options = {"use_dora": "DoRA" in kind, "target_modules": ["to_q", "to_out.0", "proj_in", "conv1"]}
        if kind.startswith("NaRA"):
            trained(text=False, **options).save_nara_weights(folder)
        else:
            save_lora(folder, **options)
    return found
