"""`--check` of both scripts: the run's own data, loss, targets and seed are measured, and nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nara_diffusion.check import run as check_run
from nara_diffusion.check.measurement import CheckSettings, CheckTask, measure
from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from train_scripts import dllm, dreambooth_sdxl

from .dreambooth_runs import tiny_arguments

WRITTEN = {"check.json", "check.png"}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[CheckTask]:
    """Checks take few samples; what they measure is noted."""
    tasks: list[CheckTask] = []

    def noted(task: CheckTask, *rest: Any) -> Any:
        tasks.append(task)
        return measure(task, *rest)

    monkeypatch.setattr(check_run, "CheckSettings", partial(CheckSettings, samples=80, steps=3, step_samples=4))
    monkeypatch.setattr(check_run, "measure", noted)
    return tasks


@pytest.fixture
def image_arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    return lambda **changes: tiny_arguments(sdxl_folder, pictures, tmp_path / "images", check=True, **changes)


def test_dllm_check_measures_the_runs_own_targets_and_stops_before_training(
    arguments: Callable[..., dllm.Arguments],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(dllm, "train", lambda *parts: pytest.fail("it trained"))
    results = dllm.main(arguments(check=True, target_modules=["q_proj", "down_proj"]))
    assert results == json.loads((tmp_path / "run" / "check.json").read_text())
    assert {file.name for file in (tmp_path / "run").iterdir()} == WRITTEN
    assert {name.rpartition(".")[2] for name in results["layers"]} == {"q_proj", "down_proj"}
    assert results["settings"]["learning_rate"] == 1e-2
    assert results["verdict"] in capsys.readouterr().out


def test_dllm_check_takes_the_losses_that_training_takes_first(
    arguments: Callable[..., dllm.Arguments],
    measured: list[CheckTask],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """B = 0 in both: the first batch has the loss of the base model."""
    seen: list[torch.Tensor] = []
    original = dllm.masked_diffusion_loss

    def noted(*parts: Any, **named: Any) -> Any:
        step = original(*parts, **named)
        seen.append(step.per_sample.detach())
        return step

    monkeypatch.setattr(dllm, "masked_diffusion_loss", noted)
    dllm.main(arguments(max_train_steps=1, output_dir=str(tmp_path / "trained")))
    dllm.main(arguments(check=True, max_train_steps=1))
    task = measured[0]
    for module in task.model.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.zeros_(module.lora_B["default"].weight)  # the check has fitted it
    torch.testing.assert_close(task.batch(range(4)).loss().per_sample, seen[0])


def test_dreambooth_check_measures_the_runs_own_targets_and_stops_before_training(
    image_arguments: Callable[..., DreamBoothArguments], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dreambooth_sdxl, "train", lambda *parts: pytest.fail("it trained"))
    results = dreambooth_sdxl.main(image_arguments(target_modules=["to_q", "conv1"], train_text_encoder=True))
    assert {file.name for file in (tmp_path / "images").iterdir()} >= WRITTEN
    assert not list((tmp_path / "images").glob("*.safetensors"))
    assert {name.rpartition(".")[2] for name in results["layers"]} == {"to_q", "conv1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "full"}, "check asks what λ tells a low-rank adapter, but adapter is 'full': give nara, or lora"),
        (
            {"resume_from_checkpoint": "latest"},
            "check measures before a training, and resume_from_checkpoint is 'latest'",
        ),
        ({"push_to_hub": True}, "push_to_hub is True: leave it out"),
    ],
)
def test_check_of_what_cannot_be_checked_is_refused(
    arguments: Callable[..., dllm.Arguments], changes: dict[str, Any], message: str
) -> None:
    full = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "rank": 8} if "adapter" in changes else {}
    with pytest.raises(ValueError, match=message):
        arguments(check=True, **full, **changes)
