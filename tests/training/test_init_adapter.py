"""--init_adapter: a run begins where the file ends, and refuses one that its flags don't describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nara_diffusion.dllm import train as dllm
from nara_diffusion.dreambooth.train import main
from nara_diffusion.loaders.file import AdapterFile
from tests.acceptance._runs import IMAGES, TEXT, image_arguments, image_flags, text_arguments
from tests.helpers.small_pipelines import small_sdxl

STILL: dict[str, Any] = {"learning_rate": 1e-30, "core_learning_rate": 1e-30, "max_train_steps": 1, "seed": 8}
"""A step by which no float32 changes."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    shared = {"target_modules": ["to_q", "conv1"], "checkpointing_steps": None, "curve_points": 1}
    shared |= {"min_noise_level": 0.3, "train_text_encoder": True}
    return image_flags(tmp_path_factory.mktemp("model"), small_sdxl()) | shared


@pytest.fixture(scope="module")
def start(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    main(image_arguments(flags, folder, max_train_steps=2, learning_rate=0.05))
    return folder


def check_starts(found: Path, given: Path) -> None:
    """The same tensors, to what a step may change."""
    tensors, expected = load_file(found), load_file(given)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-12)


def test_run_begins_where_the_file_ends(flags: dict[str, Any], start: Path, tmp_path: Path) -> None:
    for run, init in (("again", str(start / IMAGES)), ("fresh", None)):
        main(image_arguments(flags, tmp_path / run, init_adapter=init, **STILL))
    check_starts(tmp_path / "again" / IMAGES, start / IMAGES)
    given, fresh = load_file(start / IMAGES), load_file(tmp_path / "fresh" / IMAGES)
    changed = [key for key, tensor in given.items() if not torch.allclose(fresh[key], tensor, atol=1e-6)]
    assert {"core" in key for key in changed} == {True, False}
    strengths = [AdapterFile.read(folder).parts["unet"].config.strength for folder in (start, tmp_path / "again")]
    assert strengths == [[[0.3, 0.0], [0.3, 1.0]]] * 2


def test_text_run_begins_where_the_folder_ends(tmp_path: Path) -> None:
    short: dict[str, Any] = {"checkpointing_steps": None, "test_samples": 1, "curve_points": 1}
    dllm.main(text_arguments(tmp_path, **short, max_train_steps=2))
    start = {"init_adapter": str(tmp_path / "run"), "output_dir": str(tmp_path / "again")}
    dllm.main(text_arguments(tmp_path, **short, **start, **STILL))
    check_starts(tmp_path / "again" / TEXT, tmp_path / "run" / TEXT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter_options": {"core_hidden_dims": [8, 7], "core_sharing": "layer"}},
            "has core_sharing 'global', this run 'layer'",
        ),
        ({"min_noise_level": 0.2}, "has the strength .* give the same --min_noise_level and --max_noise"),
        ({"min_noise_level": None}, "has the strength .* give the same --min_noise_level and --max_noise"),
        ({"rank": 2}, "has r 3, this run 2: give --rank"),
        ({"train_text_encoder": False}, "but this run trains unet"),
        ({"adapter": "lora"}, "is a NaRA with core_type 'hypernetwork'"),
        (
            {"prediction_type": "v_prediction", "min_noise_level": None},
            "was trained for what the base predicts, this run is for v_prediction",
        ),
        ({"adapter": "hira"}, "init_adapter starts from a LoRA or a NaRA"),
        ({"init_adapter": "nowhere"}, "there is no such file or folder"),
    ],
)
def test_other_flags_than_the_file_s_are_refused(
    flags: dict[str, Any], start: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = {"init_adapter": str(start), **STILL, **changes}
    with pytest.raises(ValueError, match=message):
        main(image_arguments(flags, tmp_path / "run", **values))
