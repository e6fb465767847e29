"""Files of adapters and the base's pixels, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import save_lora, trained


@pytest.fixture(scope="session")
def nara_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NaRA of SDXL's UNet and both text encoders."""
    folder = tmp_path_factory.mktemp("nara")
    trained().save_nara_weights(folder)
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, of another rank and other modules, of the UNet alone."""
    folder = tmp_path_factory.mktemp("other")
    trained(seed=2, text=False, r=3, lora_alpha=2, target_modules=["to_q", "to_out.0", "proj_out"]).save_nara_weights(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the UNet."""
    folder = tmp_path_factory.mktemp("lora")
    save_lora(folder)
    return folder


@pytest.fixture(scope="session")
def base_pixels() -> Tensor:
    return pixels(small_sdxl())


@pytest.fixture
def pipe(nara_folder, other_folder, lora_folder) -> Any:
    """With two NaRAs, "a" and "b", and one LoRA, "static"; "a" alone adapts the text encoders."""
    pipe = small_sdxl()
    pixels(pipe)
    pipe.load_nara_weights(nara_folder, "a")
    pipe.load_nara_weights(other_folder, "b")
    pipe.load_lora_weights(lora_folder, adapter_name="static")
    return pipe
