"""How runs of train_scripts/dreambooth_sdxl.py end early, and go on."""

import json
import os
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.loop import TrainingDiverged
from nara_diffusion.training.oom import OutOfMemory
from tests.train_scripts.dreambooth_runs import WEIGHTS, one_sample
from train_scripts.dreambooth_sdxl import main


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    """Arguments of a run of a few seconds, with one sample; keyword arguments change them."""
    return one_sample(sdxl_folder, pictures, tmp_path)


def refused(args: DreamBoothArguments, message: str, error: type[Exception] = ValueError) -> None:
    """`main` raises `message` and leaves no output folder."""
    with pytest.raises(error, match=message):
        main(args)
    assert not Path(str(args.output_dir)).exists()


def test_unwritable_output(arguments, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    args = arguments(output_dir=tmp_path / "file" / "run", pretrained_model_name_or_path=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"--output_dir .*file is a file: name a folder"):
        main(args)  # before the model is even looked for


def test_a_full_disk_leaves_the_checkpoint(arguments, monkeypatch) -> None:
    """The last write fails: what was there stays whole."""
    args = arguments(checkpointing_steps=4)
    save = StableDiffusionXLPipeline.save_nara_weights
    calls = []

    def filling(self: Any, folder: Any, **options: Any) -> None:
        calls.append(folder)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        save(self, folder, **options)

    monkeypatch.setattr(StableDiffusionXLPipeline, "save_nara_weights", filling)
    with pytest.raises(OSError, match=r"the adapter could not be written to .*checkpoint is .*checkpoint-4"):
        main(args)
    folder = Path(args.output_dir)
    assert not (folder / WEIGHTS).exists()
    assert not list(folder.glob(".partial*"))
    assert (folder / "checkpoint-4" / WEIGHTS).is_file()


def test_out_of_memory_says_what_to_turn_on(arguments, monkeypatch) -> None:
    @wraps(UNet2DConditionModel.forward)  # the adapter looks for the timestep in its signature
    def full(self: Any, *args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(UNet2DConditionModel, "forward", full)
    with pytest.raises(OutOfMemory) as error:
        main(arguments())
    for remedy in ("--mixed_precision bf16", "--gradient_checkpointing", "--train_batch_size 1", "--use_8bit_adam"):
        assert remedy in str(error.value)


def test_a_diverged_run_stops_and_keeps_what_was_good(arguments) -> None:
    args = arguments(learning_rate=1e20, lr_scheduler="constant", max_grad_norm=None, checkpointing_steps=1)
    with pytest.raises(
        TrainingDiverged, match=r"training stops and nothing is overwritten. The last good checkpoint is"
    ):
        main(args)
    assert not (Path(args.output_dir) / WEIGHTS).exists()


def test_ctrl_c_saves_and_resumes(arguments, monkeypatch, caplog, tmp_path) -> None:
    whole = arguments(output_dir=tmp_path / "whole")
    main(whole)
    args = arguments()
    forward, seen = UNet2DConditionModel.forward, []

    @wraps(forward)
    def interrupting(self: Any, *positional: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *positional, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", interrupting)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 130
    assert "stopped after step 2. To continue, run the same command with --resume_from_checkpoint" in caplog.text
    folder = Path(args.output_dir)
    assert (folder / "checkpoint-2" / WEIGHTS).is_file()
    assert not (folder / WEIGHTS).exists()
    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    args.resume_from_checkpoint = "latest"
    assert main(args)["curve_after"] == json.loads((tmp_path / "whole" / "results.json").read_text())["curve_after"]


def test_resuming_another_configuration_or_a_damaged_checkpoint(arguments) -> None:
    main(arguments(max_train_steps=1, checkpointing_steps=1))
    again = {"max_train_steps": 1, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"another configuration \(noise_offset: 0.0 there, 0.1 now\)"):
        main(arguments(**again, noise_offset=0.1))
    with pytest.raises(ValueError, match="already holds another run"):
        main(arguments())
    args = arguments(**again)
    weights = Path(args.output_dir) / "checkpoint-1" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"checkpoint-1/{WEIGHTS} is corrupt"):
        main(args)
