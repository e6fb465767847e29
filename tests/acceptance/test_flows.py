"""How many files of the package a reader opens who follows a flow from its start to its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from nara_diffusion.dllm import train
from nara_diffusion.training.command import run_command
from nara_flags.parser import read_flags

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
