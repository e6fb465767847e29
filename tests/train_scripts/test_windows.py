"""Both scripts with a window of noise levels, the base held outside or not: what they log, resume and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.arguments.cli import parse_arguments
from train_scripts import dllm, dreambooth_sdxl

from .dreambooth_runs import WEIGHTS, fresh_accelerate, tiny_arguments

HELD = {"min_noise_level": 0.0, "max_noise_level": 0.5, "hold_base_outside": 2.0}


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_resumed(folder: Path, weights: str, resume: Any) -> None:
    """A run that goes on from its middle ends with the same tensors and the same log."""
    expected, log = load_file(folder / weights), metrics_of(folder)
    (folder / weights).unlink()
    fresh_accelerate()
    resume(resume_from_checkpoint=str(folder / "checkpoint-2"))
    resumed = load_file(folder / weights)
    assert resumed.keys() == expected.keys() != set()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    assert metrics_of(folder) == log


def check_log(folder: Path) -> None:
    """Loss inside and distance outside each step; no thirds of λ that lie outside; validation on both sides."""
    lines = metrics_of(folder)
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 4
    for line in steps:
        assert line["loss_inside"] > 0
        assert line["distance_outside"] > -1e-6  # 0 at first, to float32's accuracy
        assert "loss_high" not in line
    assert steps[-1]["distance_outside"] > 0
    validations = [line for line in lines if "validation_loss" in line]
    assert validations
    for line in validations:
        assert {"validation_loss_inside", "validation_loss_outside", "validation_loss_high"} <= line.keys()


def test_text_run_that_holds_the_base_logs_both_sides_and_resumes(arguments, tmp_path) -> None:
    def run(**changes: Any) -> None:
        dllm.main(arguments(**HELD, lora_dropout=0.2, checkpointing_steps=2, **changes))

    run()
    check_log(tmp_path / "run")
    check_resumed(tmp_path / "run", "adapter_model.safetensors", run)


def test_image_run_that_holds_the_base_logs_both_sides_and_resumes(sdxl_folder, pictures, tmp_path) -> None:
    options: dict[str, Any] = {**HELD, "snr_gamma": 5.0, "lora_dropout": 0.2, "train_batch_size": 4}
    options |= {"checkpointing_steps": 2, "validation_steps": 2, "num_validation_images": 1, "curve_points": 4}
    options |= {"with_prior_preservation": True, "class_data_dir": str(pictures), "class_prompt": "a toy"}

    def run(**changes: Any) -> None:
        args = {**options, "num_class_images": 3, "validation_prompts": ["a toy"], **changes}
        dreambooth_sdxl.main(tiny_arguments(sdxl_folder, pictures, tmp_path / "run", **args))

    run()
    check_log(tmp_path / "run")
    check_resumed(tmp_path / "run", WEIGHTS, run)


@pytest.mark.parametrize("adapter", ["lora", "adalora", "oft", "vera", "prompt_tuning"])
def test_other_methods_hold_the_base(arguments, tmp_path, adapter: str) -> None:
    dllm.main(arguments(**HELD, adapter=adapter, rank=2))
    check_log(tmp_path / "run")


def test_window_alone_runs_no_base_and_logs_the_loss(arguments, tmp_path) -> None:
    dllm.main(arguments(min_noise_level=0.5))
    steps = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert all("loss_low" not in line and "loss_inside" not in line for line in steps)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"min_noise_level": 0.5, "max_noise_level": 0.5}, r"0\.5 and max_noise_level 0\.5, so that no .* the smaller one"),
    ({"min_noise_level": 0.7, "max_noise_level": 0.2}, r"is 0\.7 and max_noise_level 0\.2"),
    ({"min_noise_level": 700.0}, r"min_noise_level must be in \[0, 1\] \(λ, for which timestep 700 of 1000 is 0\.7\)"),
    ({"max_noise_level": float("nan")}, r"max_noise_level must be in \[0, 1\]"),
    ({"hold_base_outside": 1.0}, r"no noise level lies outside of the window \[0, 1\]"),
    ({"min_noise_level": 0.0, "max_noise_level": 1.0, "hold_base_outside": 1.0}, r"outside of the window \[0, 1\]"),
    ({"max_noise_level": 0.5, "hold_base_outside": 0.0}, r"hold_base_outside must be above 0, or none, got 0\.0"),
    ({"max_noise_level": 0.5, "hold_base_share": 0.5}, r"hold_base_share is 0\.5, but .* give hold_base_outside"),
    ({**HELD, "hold_base_share": 1.0}, r"hold_base_share must be between 0 and 1"),
    ({**HELD, "adapter": "full"}, r"full fine-tuning trains all weights, so that no base is left"),
    ({**HELD, "adapter": "pissa"}, r"PiSSA takes its start out of the base weights"),
    ({**HELD, "adapter": "lora", "adapter_options": ["bias=all"]}, r"LoRA trains biases of the base \(bias='all'\)"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_impossible_windows_are_refused_before_anything_is_loaded(arguments, tmp_path, changes, message) -> None:
    if changes.get("adapter") == "full":
        changes = {**changes, "core_learning_rate": None}
    with pytest.raises(ValueError, match=message):
        arguments(**changes)
    with pytest.raises(ValueError, match=message):
        tiny_arguments(tmp_path, tmp_path, tmp_path / "run", **{"lora_alpha": None, **changes})


def test_window_that_the_schedule_or_the_masks_have_no_level_in_is_refused(arguments, sdxl_folder, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"masked shares are drawn from 0\.001 to 1, and none lies between"):
        arguments(max_noise_level=0.0005)
    with pytest.raises(ValueError, match=r"complementary masks have a λ of 1 − λ"):
        arguments(max_noise_level=0.5, complementary=True)
    args = tiny_arguments(sdxl_folder, pictures, tmp_path / "run", min_noise_level=0.9995)
    with pytest.raises(
        ValueError, match=r"of the 1000 noise levels of the schedule, from 0 to 0\.999, none lies between"
    ):
        dreambooth_sdxl.main(args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flag", "meant"), [("min_timestep", "min_noise_level"), ("max_timestep", "max_noise_level")])
@pytest.mark.parametrize("arguments", [DreamBoothArguments, dllm.Arguments])
def test_kohyas_flag_leads_to_the_windows(capsys, flag: str, meant: str, arguments) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments, [f"--{flag}", "200"])
    assert f"unrecognized arguments: --{flag} 200. Did you mean --{meant}?" in capsys.readouterr().err
