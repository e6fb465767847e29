"""How many files of the package a reader opens who follows a flow from its start to its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from nara_diffusion import noise_level, register_denoiser
from nara_diffusion.dllm import train
from nara_diffusion.training.command import run_command
from nara_flags.parser import read_flags
from tests.helpers.adapted import OneLayer, adapted

PACKAGE = Path(train.__file__).parents[1]
ASSETS = Path(__file__).parents[2] / "examples" / "assets"


class BackwardReached(Exception):
    pass


@contextmanager
def entered_files() -> Iterator[set[str]]:
    """The files of the package whose functions are called inside the context."""
    codes: set[CodeType] = set()
    found: set[str] = set()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            codes.add(frame.f_code)

    before: Callable[..., Any] | None = sys.getprofile()
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(before)
        paths = {Path(code.co_filename) for code in codes}
        found |= {str(path.relative_to(PACKAGE)) for path in paths if path.is_relative_to(PACKAGE)}


@pytest.mark.slow
def test_text_training_enters_few_files_up_to_the_first_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def backward(*args: Any, **settings: Any) -> None:
        raise BackwardReached

    monkeypatch.setattr(Accelerator, "backward", backward)
    flags = ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["dllm.py", *flags])
    with pytest.raises(BackwardReached), entered_files() as found:
        run_command(train.main, train.Arguments, read_flags(train.Arguments), train.shipped_run)
    assert {"dllm/train.py", "dllm/loss.py", "tuner/holder.py"} <= found
    assert len(found) <= 30, sorted(found)


@pytest.mark.slow
def test_loading_enters_few_files_up_to_the_first_image():
    pipe = DiffusionPipeline.from_pretrained(ASSETS / "sdxl-tiny")
    pipe.set_progress_bar_config(disable=True)
    with entered_files() as found:
        pipe.load_nara_weights(ASSETS / "toy-nara")
        pipe("a toy", num_inference_steps=1)
    assert {"loaders/weights.py", "tuner/holder.py"} <= found
    assert len(found) <= 15, sorted(found)


# ---------------------------------------------------------------------- from λ to the layer


def files_in_order(call: Callable[[], Any]) -> list[str]:
    """The files whose functions are called from another file of the package, or from outside, in order."""
    entries: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or not path.is_relative_to(PACKAGE):
            return
        caller = frame.f_back
        while caller is not None and not Path(caller.f_code.co_filename).is_relative_to(PACKAGE):
            caller = caller.f_back
        if caller is None or caller.f_code.co_filename != frame.f_code.co_filename:
            entries.append(str(path.relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [file for file, _ in groupby(entries)]


class Denoiser(OneLayer):
    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        return self.layer(x)


HOOK_TO_LAYER = ["rows", "core", "variants", "channel", "functional"]


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.usefixtures("_registry")
def test_noise_level_enters_no_file_twice_up_to_the_layer(is_trained: bool):
    register_denoiser("Denoiser", "discrete")
    root = adapted(Denoiser(nn.Linear(7, 5)), target_modules=["layer"], noise_level_per="sample").base_model.model
    x, timestep = torch.randn(3, 7), torch.tensor([10, 500, 900])
    first_hook = ["holder", *["checkpointing"] * is_trained, "finder"]

    def under_context() -> None:
        with noise_level(root, [0.1, 0.5, 0.9]):
            root(x)

    with torch.set_grad_enabled(is_trained):
        by_context = files_in_order(under_context)
        by_timestep = files_in_order(lambda: root(x, timestep=timestep))
    by_context, by_timestep = ([Path(file).stem for file in files] for files in (by_context, by_timestep))
    assert by_context == ["context", "level", *first_hook, *HOOK_TO_LAYER, "holder", "context"]  # both take λ away
    assert by_timestep == [*first_hook, "timesteps", "level", *HOOK_TO_LAYER, "holder"]
