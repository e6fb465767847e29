"""train_scripts/dreambooth.py on prompts of more than 77 tokens, with Stable Diffusion's CLIPs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from tests.helpers import small_pipelines
from tests.train_scripts.dreambooth_runs import WEIGHTS, fresh_accelerate, tiny_arguments, written
from train_scripts.dreambooth import main

PROMPT = " ".join((["a", "photo", "of", "toy", "red", "cube", "on", "grass"] * 14)[:105])


@pytest.fixture
def arguments(pictures, tmp_path, monkeypatch) -> Callable[..., DreamBoothArguments]:
    """Of a run on a pipeline whose CLIPs have 77 places."""
    monkeypatch.setattr(small_pipelines, "MAX_TOKENS", 77)

    def of(name: str, output: str = "run", **changes: Any) -> DreamBoothArguments:
        folder = tmp_path / name
        {"sd": small_pipelines.small_sd, "sdxl": small_pipelines.small_sdxl}[name]().save_pretrained(folder)
        prompts = {"instance_prompt": PROMPT, "validation_prompts": [PROMPT, "a red toy"]}
        values = {"max_train_steps": 2, "num_validation_images": 1, "guidance_scale": 4.0, **prompts}
        return tiny_arguments(folder, pictures, tmp_path / output, **{**values, **changes})

    return of


@pytest.fixture
def lengths(monkeypatch) -> dict[str, list[int]]:
    """Tokens that the UNet was called with, in training, in samples, and in validation losses."""
    found: dict[str, list[int]] = {"training": [], "samples": [], "validation": []}
    forward, sampling = UNet2DConditionModel.forward, []

    @wraps(forward)
    def record(self: Any, *args: Any, **told: Any) -> Any:
        stage = "training" if torch.is_grad_enabled() else "samples" if sampling else "validation"
        found[stage].append(told["encoder_hidden_states"].shape[1])
        return forward(self, *args, **told)

    monkeypatch.setattr(UNet2DConditionModel, "forward", record)
    for kind in (small_pipelines.StableDiffusionPipeline, small_pipelines.StableDiffusionXLPipeline):
        call = kind.__call__

        @wraps(call)
        def watched(self: Any, *args: Any, call: Any = call, **told: Any) -> Any:
            sampling.append(True)
            try:
                return call(self, *args, **told)
            finally:
                sampling.pop()

        monkeypatch.setattr(kind, "__call__", watched)
    return found


@pytest.mark.parametrize(("name", "skip"), [("sd", None), ("sdxl", 1)])
def test_training_samples_and_validation_read_152_tokens(arguments, lengths, tmp_path, monkeypatch, name, skip) -> None:
    args = arguments(name, max_sequence_length=152, clip_skip=skip, validation_steps=1)
    results = main(args)
    assert np.isfinite([*results["curve_before"], *results["curve_after"]]).all()
    assert results["curve_before"] != results["curve_after"]
    assert {stage: set(found) for stage, found in lengths.items()} == {stage: {152} for stage in lengths}

    card = (Path(args.output_dir) / "README.md").read_text()
    assert "Diffusers' pipelines cut them at 77: pass `prompt_embeds`" in card
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    drawn, run = np.asarray(Image.open("sample.png")).astype(int), written(Path(args.output_dir) / "samples-after")[0]
    assert np.abs(drawn - run).max() <= 1


def test_77_tokens_train_the_same_bits_as_none_said(arguments, lengths) -> None:
    runs = [arguments("sd", output=str(length), max_sequence_length=length) for length in (77, None)]
    for args in runs:
        main(args)
        fresh_accelerate()
    assert {stage: set(found) for stage, found in lengths.items()} == {stage: {77} for stage in lengths}
    one, other = (load_file(Path(run.output_dir) / WEIGHTS) for run in runs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "long_prompt_call" not in (Path(runs[0].output_dir) / "README.md").read_text()


def test_trained_text_encoders_refuse_long_prompts_before_the_model_is_loaded(arguments, monkeypatch) -> None:
    monkeypatch.setattr("train_scripts.dreambooth.loader_of", None)
    with pytest.raises(ValueError, match=r"max_sequence_length is 152, but text encoders that are trained read 77"):
        main(arguments("sd", max_sequence_length=152, train_text_encoder=True))
