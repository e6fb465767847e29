"""dllm.py in two processes, under DDP, FSDP2 and DeepSpeed: the trained adapter is that of one process, also of a run
that is killed while it writes and goes on; and what is refused before anything is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import multiprocessing as mp

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import train as dllm
from nara_diffusion.training.engines import accumulation_steps
from tests.acceptance._commands import (
    LAST_RESORT,
    ROOT,
    Moment,
    assert_same_bits,
    check_leaves_the_base_out,
    fresh_accelerate,
    metrics,
    names,
    results,
    run,
    tensors,
    words,
)
from tests.acceptance._engines import in_two_processes, needs_deepspeed, needs_gloo
from tests.acceptance._runs import ASSETS, image_flags, text_arguments, text_flags
from tests.helpers.small_pipelines import small_sdxl

TWO: dict[str, Any] = {"train_batch_size": 2}
BF16: dict[str, Any] = {"mixed_precision": "bf16"}
PRECISIONS: dict[str, dict[str, Any]] = {"no": {}, "bf16": BF16}
if find_spec("bitsandbytes"):
    PRECISIONS["4bit"] = {"load_in_4bit": True}
GEMMA: dict[str, Any] = {
    "pretrained_model_name_or_path": ASSETS / "gemma-tiny",
    "target_modules": ["all-linear"],
    "gen_length": 16,
    "generation_steps": None,
}


def slow(test: Any) -> Any:
    """Of two processes."""
    return pytest.mark.slow(needs_gloo(test))


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without dropout, whose draws are those of a process, and at a constant rate, so that it can be longer."""
    folder = tmp_path_factory.mktemp("data")
    return text_flags(folder) | {"lora_dropout": 0.0, "lr_scheduler": "constant", "checkpoints_total_limit": None}


@pytest.fixture(scope="module")
def one(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{precision: the folder of a run of one process}."""
    folders = {}
    for name, changes in PRECISIONS.items():
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        run("dllm.py", **flags, **changes, output_dir=folders[name])
    return folders


def deviation(found: Path, expected: Path, start: Path) -> float:
    """How far two adapters are apart, of how far training has moved from its first checkpoint."""
    mine, theirs, first = tensors(found), tensors(expected), tensors(start / "checkpoint-2")
    assert mine.keys() == theirs.keys()
    assert all(value.dtype == torch.float32 and value.shape == theirs[name].shape for name, value in mine.items())
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine)
    moved = sum(float((first[name] - theirs[name]).square().sum()) for name in mine)
    assert moved > 0
    return (apart / moved) ** 0.5


@slow
def test_launched_run_in_two_processes_equals_one(flags: dict[str, Any], one: dict[str, Path], tmp_path: Path) -> None:
    """By `accelerate launch`; of one global batch, the losses, weights and figures."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "train_scripts" / "dllm.py")]
    command += words(**{**flags, **TWO}, output_dir=tmp_path / "two")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LAST_RESORT)
    assert process.returncode == 0, process.stderr[-3000:]
    assert deviation(tmp_path / "two", one["no"], one["no"]) < 1e-3
    for mine, theirs in zip(metrics(tmp_path / "two"), metrics(one["no"]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    actual, expected = (results(folder) | {"seconds": 0} for folder in (tmp_path / "two", one["no"]))
    assert actual.keys() == expected.keys()
    for name in ("n", "exact_match_after", "curve_before", "curve_after", "validation_loss_after"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-4), name


@slow
def test_diffusion_gemma_in_two_processes_equals_one(flags: dict[str, Any], tmp_path: Path) -> None:
    """Encoder and decoder share each factor, which gets its gradient from both, and the model runs twice a step."""
    gemma = flags | GEMMA
    run("dllm.py", **gemma, output_dir=tmp_path / "one")
    in_two_processes([("ddp", "dllm.py", gemma | TWO | {"output_dir": tmp_path / "two"})], tmp_path)
    assert deviation(tmp_path / "two", tmp_path / "one", tmp_path / "one") < 1e-3
    for mine, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def ddp(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run under DDP in bfloat16, whose forwards have the samples of the other engines'."""
    folder = tmp_path_factory.mktemp("ddp")
    in_two_processes([("ddp", "dllm.py", flags | TWO | BF16 | {"output_dir": folder / "out"})], folder)
    return folder / "out"


@slow
@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("ddp", "bf16"),
        pytest.param("ddp", "4bit", marks=pytest.mark.skipif("4bit" not in PRECISIONS, reason="needs bitsandbytes")),
        ("fsdp2", "no"),
        ("fsdp2", "bf16"),
        pytest.param("zero-2", "bf16", marks=needs_deepspeed),
        pytest.param("zero-3", "bf16", marks=needs_deepspeed),
    ],
)
def test_killed_run_under_engine_equals_one_process(
    flags: dict[str, Any], one: dict[str, Path], ddp: Path, tmp_path: Path, engine: str, precision: str
) -> None:
    """Killed in the write of its second checkpoint, of four steps; then it goes on to six."""
    options = flags | TWO | PRECISIONS[precision]
    uninterrupted, out = ddp if (engine, precision) == ("ddp", "bf16") else tmp_path / "whole", tmp_path / "run"
    if uninterrupted != ddp:
        in_two_processes([(engine, "dllm.py", options | {"output_dir": uninterrupted})], tmp_path)
    assert deviation(uninterrupted, one[precision], one[precision]) < (0.3 if precision == "bf16" else 1e-3)
    if precision == "bf16":
        # ZeRO-3 hooks A and B, so that layers go step by step: rounded elsewhere, one process differs by .05 of itself
        most = {"zero-2": 0.03, "zero-3": 0.1}.get(engine, 0.01)
        assert deviation(uninterrupted, ddp, one["bf16"]) < most
    for name, value in tensors(uninterrupted).items():
        assert "frequencies" in name or (value != value.bfloat16()).any(), f"{name} was rounded to bfloat16"
    assert NaraConfig.from_pretrained(uninterrupted) == NaraConfig.from_pretrained(one[precision])
    check_leaves_the_base_out(uninterrupted / "checkpoint-2", flags["pretrained_model_name_or_path"])
    shorter = options | {"output_dir": out, "max_train_steps": 4}
    with pytest.raises(mp.ProcessExitedException) as ended:
        in_two_processes([(engine, "dllm.py", shorter)], tmp_path, moment=Moment("name", 4))
    assert ended.value.exit_code == -signal.SIGKILL
    assert "checkpoint-2" in names(out)
    assert "checkpoint-4" not in names(out)
    resumed = options | {"output_dir": out, "resume_from_checkpoint": "latest"}
    in_two_processes([(engine, "dllm.py", resumed)], tmp_path)
    assert_same_bits(out, uninterrupted)


@slow
def test_killed_run_without_checkpoint_begins_anew(flags: dict[str, Any], ddp: Path, tmp_path: Path) -> None:
    values = flags | TWO | BF16 | {"resume_from_checkpoint": "latest", "output_dir": tmp_path / "run"}
    with pytest.raises(mp.ProcessExitedException):
        in_two_processes([("ddp", "dllm.py", values)], tmp_path, moment=Moment("step", 1))
    assert "config.yaml" in names(tmp_path / "run")
    in_two_processes([("ddp", "dllm.py", values)], tmp_path)
    assert_same_bits(tmp_path / "run", ddp)
    with pytest.raises(SystemExit, match=r"by 2 processes, but this run has 1\. Each process"):
        run("dllm.py", **values)


@slow
def test_image_run_in_two_processes_resumes_exactly(tmp_path: Path) -> None:
    uninterrupted, one, resumed = (tmp_path / name for name in ("whole", "one", "resumed"))
    images = image_flags(tmp_path, small_sdxl()) | {"max_train_steps": 4, "snr_gamma": 5.0, "caption_dropout": 0.3}
    images["train_text_encoder"] = True  # the last layer of the first one gets no gradients
    run("dreambooth_sdxl.py", **{**images, "train_batch_size": 4}, output_dir=one)
    again = {"output_dir": resumed, "resume_from_checkpoint": uninterrupted / "checkpoint-2"}
    in_two_processes(
        [("ddp", "dreambooth_sdxl.py", images | how) for how in ({"output_dir": uninterrupted}, again)], tmp_path
    )
    assert deviation(uninterrupted, one, one) < 1e-3
    mine, theirs = tensors(resumed), tensors(uninterrupted)
    assert mine.keys() == theirs.keys() != set()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert [line["loss"] for line in metrics(resumed)][-2:] == [line["loss"] for line in metrics(uninterrupted)][-2:]


@slow
@needs_deepspeed
def test_zero_3_in_bf16_trains_in_float32(flags: dict[str, Any], tmp_path: Path) -> None:
    full = {"adapter": "full", "learning_rate": 1e-3, "core_learning_rate": None, "adapter_options": {}}
    options = flags | TWO | BF16 | full | {"lora_alpha": None, "max_train_steps": 2, "output_dir": tmp_path / "run"}
    in_two_processes([("zero-3", "dllm.py", options)], tmp_path)
    saved = tensors(tmp_path / "run")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all((value != value.bfloat16()).any() for value in saved.values())


@slow
@pytest.mark.parametrize(
    ("written", "engine", "changes", "message"),
    [
        ("ddp", "fsdp2", {}, "under one process or DDP and this run is under FSDP2 with SHARDED_STATE_DICT"),
        ("zero-2", "ddp", {}, "was written under DeepSpeed ZeRO-2 and this run is under one process or DDP"),
        (None, "fsdp2", {"load_in_4bit": True}, "can't be trained under FSDP, which shards or casts weights"),
        (None, "fsdp2", {"ema_decay": 0.9}, "ema_decay averages whole weights, and FSDP shards or casts them"),
        (None, "zero-2", {"mixed_precision": "fp16"}, "mixed_precision is fp16, and DeepSpeed would round"),
        (None, "fsdp2", GEMMA, "share their weights, and FSDP would shard them"),
        (None, "zero-3", GEMMA, "share their weights, and DeepSpeed would shard them"),
        (None, "zero-2", {"core_start_step": 1}, "core_start_step is 1, but DeepSpeed steps as soon as"),
    ],
)
def test_engine_refuses_settings_that_it_would_change(
    flags: dict[str, Any], tmp_path: Path, written: str | None, engine: str, changes: dict[str, Any], message: str
) -> None:
    if "zero" in f"{written} {engine}":
        pytest.importorskip("deepspeed")
    values = flags | TWO | {"max_train_steps": 1, "checkpointing_steps": 1, "output_dir": tmp_path / "run"}
    if written is not None:
        in_two_processes([(written, "dllm.py", values)], tmp_path)
        values |= {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-1"}
    with pytest.raises(mp.ProcessRaisedException, match=message):
        in_two_processes([(engine, "dllm.py", values | changes)], tmp_path)


# ---------------------------------------------------------------- refused before anything is loaded

FSDP = {"ACCELERATE_USE_FSDP": "true"}
FSDP2 = FSDP | {"FSDP_VERSION": "2"}


def test_engine_that_cannot_run_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    rows: list[Any] = [
        (FSDP, "no", "accelerate is set to FSDP1"),
        (FSDP2, "no", "The launcher asks for FSDP, which needs a GPU"),
        (
            FSDP2 | {"ACCELERATE_TORCH_DEVICE": "cpu"},
            "no",
            "The launcher asks for FSDP, but accelerate started without it",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "no", "The launcher asks for DeepSpeed, which needs a GPU"),
        ({"WORLD_SIZE": "2"}, "no", "2 processes were launched"),  # for lack of a rank
        ({}, "fp16", "mixed_precision fp16 needs a GPU, and accelerate finds none"),
    ]
    for environment, precision, named in rows:
        args = text_arguments(tmp_path, mixed_precision=precision)
        with patch.dict(os.environ, environment), pytest.raises(ValueError, match=named):
            dllm.main(args)
        fresh_accelerate()
        assert not (tmp_path / "run").exists()


def test_global_batch_is_divided_and_overrides_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = text_arguments(tmp_path, global_batch_size=8)
    assert [accumulation_steps(args, processes) for processes in (1, 2)] == [2, 1]
    with pytest.raises(ValueError, match="must be a multiple of the 12 samples"):
        accumulation_steps(args, 3)
    assert accumulation_steps(text_arguments(tmp_path, gradient_accumulation_steps=3), 2) == 3
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with dllm.start_run(args, "dllm", dllm.write_checkpoint) as run:
        assert (run.global_batch, run.accelerator.gradient_accumulation_steps) == (8, 2)
