"""dreambooth_sdxl.py --use_ema: the average is what is saved, measured and resumed; training is as without it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.formats import TRAINABLE
from nara_diffusion.training.weight_average import AVERAGE
from tests.train_scripts.dreambooth_runs import WEIGHTS, fresh_accelerate, tiny_arguments
from train_scripts.dreambooth_sdxl import main


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    """Arguments of a run of a few seconds, with one sample; keyword arguments change them."""
    defaults = {"validation_prompts": ["a toy"], "num_validation_images": 1, "curve_points": 2}
    return lambda name="run", **changes: tiny_arguments(
        sdxl_folder, pictures, tmp_path / name, **{**defaults, **changes}
    )


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_average_is_saved_and_measured_and_training_is_as_without(arguments, tmp_path) -> None:
    main(arguments("plain", checkpointing_steps=4))
    fresh_accelerate()
    options = {"use_ema": True, "ema_decay": 0.2, "checkpoints_total_limit": None}
    results = main(arguments(checkpointing_steps=1, validation_steps=2, **options))
    run, plain = tmp_path / "run", tmp_path / "plain"
    steps = [load_file(run / f"checkpoint-{n}" / TRAINABLE) for n in range(1, 5)]
    average = {name: value.double() for name, value in steps[0].items()}
    for n, weights in enumerate(steps[1:], 2):
        d = min(0.2, n / (n + 9))
        average = {name: d * value + (1 - d) * weights[name].double() for name, value in average.items()}
    kept = load_file(run / "checkpoint-4" / AVERAGE)
    assert kept.pop("optimizer_steps") == 4
    assert kept.keys() == average.keys()
    for name, value in kept.items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)

    # what a user loads, from the output folder and from a checkpoint, is the average
    saved = load_file(run / WEIGHTS)
    assert same(saved, load_file(run / "checkpoint-4" / WEIGHTS))
    values = [value.flatten() for name, value in saved.items() if "freq" not in name]
    torch.testing.assert_close(
        torch.cat(values).sort().values, torch.cat([value.flatten() for value in kept.values()]).sort().values
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(arguments().pretrained_model_name_or_path)
    pipe.load_nara_weights(run)
    # training never sees it: the same losses and the same last weights as a run without it
    own = load_file(plain / WEIGHTS)
    assert not same(saved, own)
    last = torch.cat([value.flatten() for value in steps[-1].values()]).sort().values
    assert torch.equal(last, torch.cat([v.flatten() for name, v in own.items() if "freq" not in name]).sort().values)
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (run, plain)]
    assert losses[0] == losses[1]
    # and what is logged during training is of the average as well
    validation = [line["validation_loss"] for line in metrics(run) if "validation_loss" in line]
    assert validation[-1] == pytest.approx(results["validation_loss_after"], rel=1e-5)
    plain_results = json.loads((plain / "results.json").read_text())
    assert abs(plain_results["validation_loss_after"] - validation[-1]) > 1e-6


@pytest.mark.parametrize(
    "options",
    [{"train_text_encoder": True, "mixed_precision": "bf16"}, {"adapter": "pissa"}, {"adapter": "full"}],
    ids=lambda options: next(iter(options.values())),
)
def test_a_resumed_run_ends_with_the_same_bits(arguments, tmp_path, options: dict) -> None:
    options = {"learning_rate": 1e-4, "core_learning_rate": None, **options, "use_ema": True}
    if options.get("adapter") == "full":
        options |= {"rank": 8, "lora_alpha": None}
    main(arguments("whole", checkpointing_steps=2, **options))
    fresh_accelerate()
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    main(arguments(checkpointing_steps=2, **options, resume_from_checkpoint="latest"))
    for place in (".", "checkpoint-4"):
        whole, resumed = (tmp_path / name / place for name in ("whole", "run"))
        files = [path.relative_to(whole) for path in whole.rglob("*.safetensors") if place != "." or
                 "checkpoint" not in str(path.relative_to(whole))]  # fmt: skip
        assert len(files) >= (1 if place == "." else 3)
        for file in files:
            assert same(load_file(whole / file), load_file(resumed / file)), file
    losses = [metrics(tmp_path / name)[-2:] for name in ("whole", "run")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 0.9}, "ema_decay is 0.9, but nothing is averaged: add use_ema"),
        ({"use_ema": True, "ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), or none, got 1.0"),
        ({"use_ema": True, "adapter": "adalora"}, "adapter adalora drops directions of the last one"),
    ],
)
def test_impossible_values_are_refused(arguments, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**changes)
