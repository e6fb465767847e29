"""--ema_decay: the moving average of the trained weights is measured, saved and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from nara_diffusion.dllm import train as dllm
from nara_diffusion.dreambooth import train as images
from nara_diffusion.training.optimization import average_weights, averaged
from tests.acceptance._commands import metrics, results
from tests.acceptance._runs import IMAGES, TEXT, image_arguments, image_flags, text_arguments
from tests.helpers.small_pipelines import small_sd3

TWO: dict[str, Any] = {"max_train_steps": 2, "checkpointing_steps": 1, "ema_decay": 0.9, "curve_points": 1}


def second_average(run: Path, file: str) -> dict[str, Tensor]:
    """The average after two steps: 2/11 of the first weights, 9/11 of the second."""
    first, second = (load_file(run / f"checkpoint-{step}" / file) for step in (1, 2))
    assert first.keys() == second.keys()
    return {name: (2 * tensor.double() + 9 * second[name].double()) / 11 for name, tensor in first.items()}


def assert_is_average(run: Path, file: str) -> None:
    saved = {name: tensor.double() for name, tensor in load_file(run / file).items()}
    torch.testing.assert_close(saved, second_average(run, file), rtol=1e-6, atol=1e-9)
    last = load_file(run / "checkpoint-2" / file)
    assert any(not torch.allclose(saved[name], last[name].double(), rtol=1e-4) for name in saved)


def test_average_follows_the_ramp_up_to_its_decay() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 5)
    model = nn.Sequential(layer, nn.Linear(5, 2).requires_grad_(False))
    average = average_weights(Accelerator(), model, decay=0.9)
    assert average is not None
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for n in range(100):
        layer.weight.data = torch.randn(5, 3)
        average.ema.step(average.weights)
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        expected = decay * expected + (1 - decay) * layer.weight.double()
    last = layer.weight.clone()
    with averaged(average):
        torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.weight, last)
    assert len(average.weights) == 2
    assert average_weights(Accelerator(), model, None) is None


def test_text_run_measures_and_resumes_its_average(tmp_path: Path) -> None:
    def train(folder: Path, **changes: Any) -> Path:
        folder.mkdir(exist_ok=True)
        dllm.main(text_arguments(folder, **TWO | {"test_samples": 1} | changes))
        return folder / "run"

    run = train(tmp_path / "whole", validation_steps=1)
    assert_is_average(run, TEXT)
    [measured] = [line["validation_loss"] for line in metrics(run) if line["step"] == 2 and "validation_loss" in line]
    assert measured == results(run)["validation_loss_after"]
    shutil.copytree(run / "checkpoint-1", tmp_path / "resumed" / "run" / "checkpoint-1")
    resumed = train(tmp_path / "resumed", resume_from_checkpoint="latest")  # and without validation
    for file in (TEXT, f"checkpoint-2/{TEXT}"):
        torch.testing.assert_close(load_file(resumed / file), load_file(run / file), rtol=0, atol=0)


@pytest.mark.slow
def test_image_run_samples_and_saves_its_average(tmp_path: Path) -> None:
    flags = image_flags(tmp_path, small_sd3()) | TWO
    run = tmp_path / "run"
    images.main(image_arguments(flags, run, validation_steps=2))
    assert_is_average(run, IMAGES)
    [measured] = [line["validation_loss"] for line in metrics(run) if "validation_loss" in line]
    assert measured == results(run)["validation_loss_after"]
