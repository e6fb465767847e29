"""Runs of train_scripts/dreambooth_sdxl.py compared: what changes nothing, and what changes the loss."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.loaders.file import read_tensors
from nara_diffusion.training.arguments.cli import parse_arguments
from tests.helpers.patience import LAST_RESORT
from tests.train_scripts.dreambooth_runs import WEIGHTS, fresh_accelerate, tiny_arguments, write_pictures
from train_scripts.dreambooth_sdxl import main

ROOT = Path(__file__).parents[3]

SHORT: dict[str, Any] = {"num_validation_images": 1, "max_train_steps": 3}


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    """Arguments of a run of a few seconds; keyword arguments change them."""
    return lambda **changes: tiny_arguments(
        sdxl_folder, pictures, Path(changes.pop("output_dir", tmp_path / "run")), **changes
    )


@pytest.fixture(scope="module")
def plain(sdxl_folder, pictures, tmp_path_factory) -> SimpleNamespace:
    """A short run, for others to be compared with."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    results = main(tiny_arguments(sdxl_folder, pictures, folder, **SHORT))
    fresh_accelerate()
    return SimpleNamespace(folder=folder, results=results)


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def assert_same_adapter(one: Path, other: Path) -> None:
    """Bit for bit; safetensors writes the entries of its metadata in any order."""
    mine, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert read_tensors(one / WEIGHTS)[1] == read_tensors(other / WEIGHTS)[1]


@pytest.mark.parametrize(
    "common",
    [
        {"lora_dropout": 0.1, "dataloader_num_workers": 2, "cache_latents": False},
        {"gradient_accumulation_steps": 2, "train_text_encoder": True, "lora_dropout": 0.1, "validation_steps": 3},
    ],
    ids=["workers", "text-encoders"],
)
def test_a_resumed_run_ends_with_the_same_bits(arguments, tmp_path, common: dict) -> None:
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": str(write_pictures(tmp_path / "class", 5, (16, 16), seed=8)),
        "class_prompt": "a toy",
        "num_class_images": 5,
    }
    common = {**common, **prior, "snr_gamma": 5.0, "noise_offset": 0.1, "num_validation_images": 1}
    whole = arguments(output_dir=str(tmp_path / "whole"), **common)
    main(whole)
    stopped = arguments(checkpointing_steps=2, **common)
    main(stopped)
    folder = Path(stopped.output_dir)
    assert_same_adapter(folder, tmp_path / "whole")
    (folder / WEIGHTS).unlink()
    argv = ["--config", str(folder / "config.yaml"), "--resume_from_checkpoint", str(folder / "checkpoint-2")]
    main(parse_arguments(DreamBoothArguments, argv))
    assert_same_adapter(folder, tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"cache_latents": False},
        {"cache_memory": 0.0},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_nothing(arguments, tmp_path, plain, changes: dict) -> None:
    main(arguments(**SHORT, **changes))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(plain.folder), rtol=1e-5, atol=1e-6)
    one, other = load_file(tmp_path / "run" / WEIGHTS), load_file(plain.folder / WEIGHTS)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)


def test_accumulated_forwards_make_the_step_of_a_large_batch(arguments, tmp_path, pictures) -> None:
    """Stratified timesteps and noise are those of the samples, however they are grouped."""
    common = {"num_validation_images": 1, "max_train_steps": 3, "center_crop": True, "random_flip": False}
    main(arguments(output_dir=str(tmp_path / "one"), train_batch_size=4, **common))
    main(arguments(train_batch_size=2, gradient_accumulation_steps=2, **common))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-6)


def test_bf16_trains_float32_weights(arguments, tmp_path) -> None:
    main(arguments(output_dir=str(tmp_path / "plain"), train_text_encoder=True))
    AcceleratorState._reset_state(True)  # a process has one precision
    main(arguments(mixed_precision="bf16", train_text_encoder=True))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "plain"), rtol=0.05, atol=0)
    weights = load_file(tmp_path / "run" / WEIGHTS)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    # a weight that were rounded to bf16 at each step would have the lower half of its bits empty
    assert any((value != value.bfloat16().float()).any() for name, value in weights.items() if "lora_B" in name)


def test_class_images_are_made_and_trained_on(arguments, tmp_path, plain) -> None:
    folder = tmp_path / "class"
    prior = {"with_prior_preservation": True, "class_data_dir": str(folder), "class_prompt": "a red toy"}
    main(arguments(**prior, num_class_images=3, **SHORT))
    assert len(list(folder.glob("*.png"))) == 3
    assert losses(tmp_path / "run")[0] > 1.5 * losses(plain.folder)[0]  # ℓ + ℓ'


def test_held_out_images_give_the_validation_loss(arguments, tmp_path, plain) -> None:
    """The training is the same, and what is measured differs."""
    held_out = str(write_pictures(tmp_path / "held-out", 2, seed=20))
    results = main(arguments(validation_data_dir=held_out, **SHORT))
    assert losses(tmp_path / "run") == losses(plain.folder)
    assert results["curve_before"] != plain.results["curve_before"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(arguments, tmp_path) -> None:
    """On the same global batch, with accelerate's own launcher, class images and text encoders included."""
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": str(write_pictures(tmp_path / "class", 5, (16, 16), seed=8)),
        "class_prompt": "a toy",
        "num_class_images": 5,
    }
    common = {**prior, "train_text_encoder": True, "center_crop": True, "validation_steps": 2}
    main(arguments(output_dir=str(tmp_path / "one"), train_batch_size=4, **common))
    config = tmp_path / "two.yaml"
    two = arguments(output_dir=str(tmp_path / "two"), train_batch_size=2, **common)
    config.write_text(yaml.safe_dump(asdict(two)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "train_scripts" / "dreambooth_sdxl.py"), "--config", str(config)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LAST_RESORT)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-5)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[1]["curve_before"] == pytest.approx(results[0]["curve_before"], rel=1e-4)
    assert results[1]["curve_after"] == pytest.approx(results[0]["curve_after"], rel=1e-3)
    assert len(list((tmp_path / "two" / "samples-after").glob("*.png"))) == 4
