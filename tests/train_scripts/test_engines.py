"""Under every engine of accelerate a run that goes on from a checkpoint ends as one that was never stopped, and as DDP.

Nothing but the engine differs: the processes' dropout and samples are the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.engines import HAS_DEEPSPEED, in_two_processes
from train_scripts.dllm import Arguments, main

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed")

TRAININGS: dict[str, dict[str, Any]] = {
    "nara": {"lora_dropout": 0.2, "core_learning_rate": 1e-2},
    "nara, DoRA": {"lora_dropout": 0.2, "core_learning_rate": 1e-2, "use_dora": True},
    "all weights": {"adapter": "full", "learning_rate": 1e-3},
}
FSDP = [
    ("fsdp", "nara"),
    ("fsdp, full states", "nara, DoRA"),
    ("fsdp, loaded once", "nara"),
    ("fsdp", "all weights"),
]
DEEPSPEED = [
    pytest.param(kind, id=", ".join(kind), marks=[needs_deepspeed, *marks])
    for kind, *marks in (
        (("zero-2", "nara"), pytest.mark.slow),
        (("zero-3", "nara, DoRA"), pytest.mark.slow),
        (("zero-3", "all weights"), pytest.mark.slow),
    )
]
DDP = [("ddp", training) for training in TRAININGS]


Kind = tuple[str, str]
Folders = dict[Kind, Path]
FolderOf = Callable[[Kind], Path]


@pytest.fixture(scope="module")
def make_args(llada_folder: Path, data: dict[str, str]) -> Callable[..., Arguments]:
    def make(training: str, folder: Path, **changes: Any) -> Arguments:
        return Arguments(
            pretrained_model_name_or_path=str(llada_folder),
            **data,
            output_dir=str(folder),
            **{
                "rank": 3,
                "target_modules": ["all-linear"],
                "trained_padding": "3",
                "lr_scheduler": "cosine",
                "core_hidden_dims": [8, 7],
                "train_batch_size": 2,
                "max_train_steps": 4,
                "max_length": 40,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "checkpointing_steps": 2,
                "validation_steps": 2,
                "eval_batch_size": 4,
                "gen_length": 2,
                "curve_points": 1,
                "test_samples": 2,
                **({} if training == "all weights" else {"lora_alpha": 5.0}),
                **TRAININGS[training],
                **changes,
            },
        )

    return make


def train_twice(kinds: list[Kind], folder: Path, make_args: Callable[..., Arguments], per_spawn: int) -> Folders:
    """{(engine, training): a folder with `whole`, a run of four steps, and `resumed`, its last two done again}."""
    folders = {kind: folder / str(number) for number, kind in enumerate(kinds)}
    for name in ("whole", "resumed"):
        runs = []
        for (engine, training), place in folders.items():
            if name == "resumed":
                shutil.copytree(place / "whole" / "checkpoint-2", place / name / "checkpoint-2")
            changes = {"resume_from_checkpoint": "latest"} if name == "resumed" else {}
            runs.append((engine, make_args(training, place / name, **changes)))
        for start in range(0, len(runs), per_spawn):
            in_two_processes(main, runs[start : start + per_spawn])
    return folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_args: Callable[..., Arguments]) -> Folders:
    return train_twice(DDP + FSDP, tmp_path_factory.mktemp("torch"), make_args, per_spawn=len(DDP + FSDP))


@pytest.fixture(scope="module")
def deepspeed_folder(tmp_path_factory: pytest.TempPathFactory, make_args: Callable[..., Arguments]) -> FolderOf:
    """The folder of a kind, which is trained when it is first asked for."""

    @cache
    def folder(kind: Kind) -> Path:
        return train_twice([kind], tmp_path_factory.mktemp("deepspeed"), make_args, per_spawn=1)[kind]

    return folder


@pytest.mark.parametrize("kind", DDP + FSDP, ids=", ".join)
def test_resume_ends_as_an_uninterrupted_run(folders: Folders, kind: Kind) -> None:
    check_resumed(folders[kind])


@pytest.mark.parametrize("kind", DEEPSPEED)
def test_resume_ends_as_an_uninterrupted_run_with_deepspeed(deepspeed_folder: FolderOf, kind: Kind) -> None:
    check_resumed(deepspeed_folder(kind))


@pytest.mark.parametrize("kind", FSDP, ids=", ".join)
def test_checkpoint_and_export_hold_what_ddp_writes(folders: Folders, kind: Kind) -> None:
    check_written(folders[kind], folders["ddp", kind[1]])


@pytest.mark.parametrize("kind", DEEPSPEED)
def test_checkpoint_and_export_hold_what_ddp_writes_with_deepspeed(
    deepspeed_folder: FolderOf, folders: Folders, kind: Kind
) -> None:
    check_written(deepspeed_folder(kind), folders["ddp", kind[1]])


def check_resumed(folder: Path) -> None:
    for place in ("checkpoint-4", "."):
        whole, resumed = (weights(folder / name / place) for name in ("whole", "resumed"))
        assert resumed.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    losses = [metrics(folder / name)[-2:] for name in ("whole", "resumed")]
    assert losses[0] == losses[1]


def check_written(folder: Path, ddp: Path) -> None:
    """Other engines add gradients up in another order, so Adam's steps agree but for that."""
    start = weights(ddp / "whole" / "checkpoint-2")
    for place in ("checkpoint-2", "checkpoint-4", "."):
        found, expected = weights(folder / "whole" / place), weights(ddp / "whole" / place)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert any((weights(ddp / "whole")[name] - value).abs().max() > 3e-4 for name, value in start.items())


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", FSDP[:3], ids=", ".join)
def test_checkpoint_leaves_the_frozen_base_out(folders: Folders, kind: Kind, llada_folder: Path) -> None:
    check_size(folders[kind], llada_folder)


@pytest.mark.parametrize("kind", DEEPSPEED[:2])
def test_checkpoint_leaves_the_frozen_base_out_with_deepspeed(
    deepspeed_folder: FolderOf, kind: Kind, llada_folder: Path
) -> None:
    check_size(deepspeed_folder(kind), llada_folder)


def check_size(folder: Path, base: Path) -> None:
    """By bytes that occur in no other file: rows of the base's embedding."""
    rows = load_file(base / "model.safetensors")["model.transformer.wte.weight"]
    row = rows[5].numpy().tobytes()
    files = [path for path in (folder / "whole" / "checkpoint-2").rglob("*") if path.is_file()]
    assert not [path.name for path in files if row in path.read_bytes()]
    assert row in (base / "model.safetensors").read_bytes()
