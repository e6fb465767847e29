"""`--check` of both scripts: the run's own objective is measured, on its own data, and nothing else is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion.check import verdict as check_verdict
from nara_diffusion.check import verdict_report
from nara_diffusion.check.trials import CheckSettings, CheckTask, published, trials
from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.adapters.configs import adapter_config
from train_scripts import dllm, dreambooth

from .dreambooth_runs import fresh_accelerate, tiny_arguments, write_pictures

WRITTEN = {"check.json", "check.png"}
OBJECTIVES: list[dict[str, Any]] = [
    {"snr_gamma": 5.0, "noise_offset": 0.1},
    {"prediction_type": "flow_prediction", "snr_gamma": 5.0},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]
WINDOWS: list[dict[str, Any]] = [{"max_noise_level": 0.5}, {"min_noise_level": 0.6}]


class Stopped(Exception):
    """Where training would begin."""


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[CheckTask]:
    """Checks take few samples; what they measure is noted."""
    tasks: list[CheckTask] = []

    def noted(task: CheckTask, *rest: Any) -> Any:
        tasks.append(task)
        return trials(task, *rest)

    monkeypatch.setattr(verdict_report, "CheckSettings", partial(CheckSettings, steps=2, samples=20, repeats=3))
    monkeypatch.setattr(check_verdict, "trials", noted)
    return tasks


@pytest.fixture
def image_arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    defaults = {"output_dir": str(tmp_path / "images")}
    return lambda **changes: tiny_arguments(sdxl_folder, pictures, tmp_path, **defaults | changes)


def first_losses(script: Any, args: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Those of the first batch of a training, whose adapter is disturbed."""
    found: list[Tensor] = []

    def first(run: Any, model: nn.Module, *others: Any, **options: Any) -> None:
        _, _, loader, _, loss, *_ = others
        disturb(model)
        found.append(loss(next(iter(loader))).per_sample.detach())
        raise Stopped

    monkeypatch.setattr(script, "train", first)
    with pytest.raises(Stopped):
        script.main(args)
    fresh_accelerate()
    return found[0]


def disturb(model: nn.Module) -> None:
    """Fills what is trained with numbers that its order alone decides; B = 0 would hide an update, and a drift."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def checked_losses(script: Any, args: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same of its check."""
    task = held_task(script, args, monkeypatch)
    return task.loss(range(args.train_batch_size)).per_sample.detach()


def held_task(script: Any, args: Any, monkeypatch: pytest.MonkeyPatch, disturbed: bool = True) -> CheckTask:
    """The task of a script's check."""
    tasks: list[CheckTask] = []

    def stop(task: CheckTask, *rest: Any) -> None:
        tasks.append(task)
        raise Stopped

    monkeypatch.setattr(script, "check_training", stop)
    with pytest.raises(Stopped):
        script.main(args)
    if disturbed:
        disturb(tasks[0].model)
    return tasks[0]


@pytest.mark.parametrize("changes", [*OBJECTIVES, *WINDOWS], ids=str)
def test_dreambooth_check_measures_the_losses_of_training(
    changes: dict[str, Any],
    image_arguments: Callable[..., DreamBoothArguments],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    trained = image_arguments(output_dir=str(tmp_path / "trained"), **changes)
    expected = first_losses(dreambooth, trained, monkeypatch)
    found = checked_losses(dreambooth, image_arguments(check=True, **changes), monkeypatch)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [{"complementary": True}, *WINDOWS], ids=str)
def test_dllm_check_measures_the_losses_of_training(
    changes: dict[str, Any],
    arguments: Callable[..., dllm.Arguments],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expected = first_losses(dllm, arguments(output_dir=str(tmp_path / "trained"), **changes), monkeypatch)
    torch.testing.assert_close(checked_losses(dllm, arguments(check=True, **changes), monkeypatch), expected)


def test_dllm_check_measures_the_runs_own_targets_and_stops_before_training(
    arguments: Callable[..., dllm.Arguments],
    measured: list[CheckTask],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(dllm, "train", lambda *parts: pytest.fail("it trained"))
    results = dllm.main(arguments(check=True, target_modules=["q_proj", "down_proj"]))
    assert results == json.loads((tmp_path / "run" / "check.json").read_text())
    assert {file.name for file in (tmp_path / "run").iterdir()} == WRITTEN
    layers = [name for name, module in measured[0].model.named_modules() if hasattr(module, "lora_A")]
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "down_proj"}
    assert results["learning_rate"] == measured[0].args.learning_rate == 1e-2
    assert results["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["lora", "rslora", "nara_knots", "multi_lora", "tlora", "dora", "vera"])
def test_published_is_nara_of_the_arguments_rank_and_scale_whatever_the_adapter(
    adapter: str, arguments: Callable[..., dllm.Arguments]
) -> None:
    config: Any = adapter_config(published(arguments(check=True, adapter=adapter)))
    assert (config.core_type, config.core_init, config.core_sharing) == ("hypernetwork", "zero_last", "global")
    assert (config.r, config.use_dora, config.use_rslora) == (3, False, adapter == "rslora")


def test_dreambooth_check_adapts_the_runs_own_targets_in_the_unet_alone(
    image_arguments: Callable[..., DreamBoothArguments],
    measured: list[CheckTask],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(dreambooth, "train", lambda *parts: pytest.fail("it trained"))
    monkeypatch.setattr(dreambooth, "load_class_images", lambda *parts: pytest.fail("it made class images"))
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a toy"}
    dreambooth.main(image_arguments(check=True, target_modules=["to_q", "conv1"], train_text_encoder=True, **prior))
    assert {file.name for file in (tmp_path / "images").iterdir()} >= WRITTEN
    assert not list((tmp_path / "images").glob("*.safetensors"))
    layers = [name for name, module in measured[0].model.named_modules() if hasattr(module, "lora_A")]
    assert {name.rpartition(".")[2] for name in layers} == {"to_q", "conv1"}
    assert all(name.startswith("unet.") for name in layers)


def test_dreambooth_check_measures_images_that_are_held_out(
    image_arguments: Callable[..., DreamBoothArguments], measured: list[CheckTask], tmp_path: Path
) -> None:
    others = write_pictures(tmp_path / "others", 2, seed=9)
    own = dreambooth.main(image_arguments(check=True))
    fresh_accelerate()
    there = image_arguments(check=True, validation_data_dir=str(others), output_dir=str(tmp_path / "there"))
    assert dreambooth.main(there)["losses"]["base"] != own["losses"]["base"]
    for task in measured:
        disturb(task.model)
    torch.testing.assert_close(*(task.loss(range(2)).per_sample for task in measured))  # trained on the same


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
