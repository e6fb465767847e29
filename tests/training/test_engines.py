"""Engines: what is refused before anything is loaded, and two processes that are killed while they write and go on."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import multiprocessing as mp

from nara_diffusion.dllm import train as dllm
from nara_diffusion.training.engines import accumulation_steps
from tests.acceptance._commands import Moment, assert_same_bits, fresh_accelerate, names
from tests.acceptance._engines import in_two_processes, needs_deepspeed, needs_gloo
from tests.acceptance._runs import TEXT, text_arguments, text_flags

TWO: dict[str, Any] = {"train_batch_size": 2, "max_train_steps": 4, "logging_steps": 3, "test_samples": 1}


FSDP = {"ACCELERATE_USE_FSDP": "true"}
FSDP2 = FSDP | {"FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("asked", "precision", "named"),
    [
        (FSDP, "no", "accelerate is set to FSDP1"),
        (FSDP2, "no", "FSDP was asked for, which accelerate has on GPUs only"),
        (FSDP2 | {"ACCELERATE_TORCH_DEVICE": "cpu"}, "no", "FSDP was asked for, and accelerate runs without it"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "no", "DeepSpeed was asked for, which accelerate has on GPUs only"),
        ({"WORLD_SIZE": "2"}, "no", "2 processes were launched, and accelerate runs each alone"),  # for lack of a rank
        ({}, "fp16", "mixed_precision is fp16, which needs a GPU, and accelerate finds none"),
    ],
)
def test_engine_that_cannot_run_here_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], precision: str, named: str
) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    args = text_arguments(tmp_path, mixed_precision=precision)
    with pytest.raises(ValueError, match=named):
        dllm.main(args)
    fresh_accelerate()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("batch", "processes", "steps"), [(32, 2, 4), (8, 2, 1)])
def test_global_batch_is_divided_among_processes(batch: int, processes: int, steps: int) -> None:
    args = SimpleNamespace(global_batch_size=batch, train_batch_size=4, gradient_accumulation_steps=1)
    assert accumulation_steps(args, processes) == steps
    with pytest.raises(ValueError, match="isn't a multiple of the 12 samples"):
        accumulation_steps(args, 3)


def test_arguments_win_over_accelerate_s_accumulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    args = text_arguments(tmp_path, gradient_accumulation_steps=2)
    with dllm.start_run(args, "dllm", dllm.write_checkpoint) as run:
        assert run.global_batch == 8
        assert run.accelerator.gradient_accumulation_steps == 2


# ---------------------------------------------------------------- two processes

ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero-{stage}", marks=needs_deepspeed) for stage in (2, 3))]


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize(
    ("engine", "what"),
    [
        ("ddp", "name"),
        ("fsdp2", "first file"),
        pytest.param("zero-2", "name", marks=needs_deepspeed),
        pytest.param("zero-3", "first file", marks=needs_deepspeed),
    ],
)
def test_two_processes_killed_in_a_write_go_on_to_the_same_bits(tmp_path: Path, engine: str, what: str) -> None:
    flags = text_flags(tmp_path) | TWO
    in_two_processes([(engine, "dllm.py", flags | {"output_dir": tmp_path / "whole"})], tmp_path)
    killed = flags | {"output_dir": tmp_path / "run"}
    with pytest.raises(mp.ProcessExitedException) as ended:
        in_two_processes([(engine, "dllm.py", killed)], tmp_path, moment=Moment(what, 4))
    assert ended.value.exit_code == -signal.SIGKILL
    assert "checkpoint-2" in names(tmp_path / "run")
    assert "checkpoint-4" not in names(tmp_path / "run")
    in_two_processes([(engine, "dllm.py", killed | {"resume_from_checkpoint": "latest"})], tmp_path)
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_begin_anew_and_go_on_longer(tmp_path: Path, engine: str) -> None:
    """A run that is killed before its first checkpoint; the same command again; a longer one; another number."""
    flags = text_flags(tmp_path) | TWO | {"lr_scheduler": "constant", "checkpointing_steps": 3}
    flags |= {"resume_from_checkpoint": "latest", "output_dir": tmp_path / "run"}
    with pytest.raises(mp.ProcessExitedException):
        in_two_processes([(engine, "dllm.py", flags)], tmp_path, moment=Moment("step", 2))
    assert "config.yaml" in names(tmp_path / "run")
    longer = flags | {"max_train_steps": 6}
    whole = longer | {"output_dir": tmp_path / "whole"}
    for each in (flags, longer, whole):
        in_two_processes([(engine, "dllm.py", each)], tmp_path)
    assert (tmp_path / "run" / TEXT).read_bytes() == (tmp_path / "whole" / TEXT).read_bytes()
    if engine == "ddp":
        with pytest.raises(ValueError, match="by 2 processes and this run has 1, each of which has random states"):
            dllm.main(text_arguments(tmp_path, **flags))
