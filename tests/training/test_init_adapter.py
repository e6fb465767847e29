"""--init_adapter: a run begins where the file ends, and refuses one that its flags don't describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nara_diffusion.dreambooth.train import main
from tests.acceptance._commands import fresh_accelerate
from tests.acceptance._runs import IMAGES, image_arguments, image_flags
from tests.helpers.small_pipelines import small_sdxl

STILL: dict[str, Any] = {"learning_rate": 1e-30, "core_learning_rate": 1e-30, "max_train_steps": 1, "seed": 8}
"""A step by which no float32 changes."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    fresh_accelerate()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    shared = {"target_modules": ["to_q", "conv1"], "checkpointing_steps": None, "curve_points": 1}
    return image_flags(tmp_path_factory.mktemp("model"), small_sdxl()) | shared


@pytest.fixture(scope="module")
def start(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    main(image_arguments(flags, folder, train_text_encoder=True, max_train_steps=2, learning_rate=0.05))
    fresh_accelerate()
    return folder


@pytest.mark.parametrize("name", [IMAGES, pytest.param("", marks=pytest.mark.slow)])
def test_run_begins_where_the_file_ends(flags: dict[str, Any], start: Path, tmp_path: Path, name: str) -> None:
    given = load_file(start / IMAGES)
    for run, init in (("again", str(start / name)), ("fresh", None)):
        main(image_arguments(flags, tmp_path / run, train_text_encoder=True, init_adapter=init, **STILL))
        fresh_accelerate()
    again, fresh = (load_file(tmp_path / run / IMAGES) for run in ("again", "fresh"))
    assert again.keys() == given.keys()
    for key, tensor in given.items():
        torch.testing.assert_close(again[key], tensor, rtol=0, atol=1e-12)
    changed = [key for key, tensor in given.items() if not torch.allclose(fresh[key], tensor, atol=1e-6)]
    assert {"core" in key for key in changed} == {True, False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter_options": {"core_hidden_dims": [8, 7], "core_sharing": "layer"}},
            "has core_sharing 'global', this run 'layer'",
        ),
        ({"rank": 2}, "has r 3, this run 2: give --rank"),
        ({"train_text_encoder": False}, "but this run trains unet"),
        ({"adapter": "lora"}, "is a NaRA with core_type 'hypernetwork'"),
        ({"prediction_type": "v_prediction"}, "was trained for what the base predicts, this run is for v_prediction"),
        ({"adapter": "hira"}, "init_adapter starts from a LoRA or a NaRA"),
        ({"init_adapter": "nowhere"}, "there is no such file or folder"),
    ],
)
def test_other_flags_than_the_file_s_are_refused(
    flags: dict[str, Any], start: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = {"init_adapter": str(start), "train_text_encoder": True, **STILL, **changes}
    with pytest.raises(ValueError, match=message):
        main(image_arguments(flags, tmp_path / "run", **values))
