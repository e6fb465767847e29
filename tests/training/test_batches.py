"""The global batch is what the arguments say, whatever the number of processes and whatever accelerate is told."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from nara_diffusion.training.arguments.cli import parse_arguments
from nara_diffusion.training.batches import accumulation_steps, check_accumulation
from nara_diffusion.training.run import start_run
from train_scripts.dllm import Arguments


@pytest.mark.parametrize(
    ("given", "batch", "processes", "expected"), [(32, 1, 1, 32), (32, 1, 8, 4), (24, 3, 2, 4), (6, 3, 2, 1)]
)
def test_a_global_batch_is_dealt_out_to_the_processes(small_args, given, batch, processes, expected) -> None:
    args = small_args(global_batch_size=given, train_batch_size=batch)
    assert accumulation_steps(args, processes) == expected


@pytest.mark.parametrize(("given", "batch", "processes"), [(32, 1, 3), (32, 5, 1), (4, 8, 1)])
def test_one_that_cannot_be_dealt_out_is_refused(small_args, given, batch, processes) -> None:
    args = small_args(global_batch_size=given, train_batch_size=batch)
    with pytest.raises(ValueError, match=f"global_batch_size {given} isn't a multiple of the {batch * processes} samp"):
        accumulation_steps(args, processes)


def test_without_one_the_accumulation_is_each_processes_own(small_args) -> None:
    assert accumulation_steps(small_args(gradient_accumulation_steps=5), 7) == 5


def test_both_are_refused(small_args) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2 and global_batch_size 8"):
        small_args(global_batch_size=8, gradient_accumulation_steps=2)


def test_a_run_with_a_global_batch_is_that_of_its_accumulation(small_args, small_run, tmp_path) -> None:
    by_batch = small_run(small_args(global_batch_size=12))
    other = small_args(gradient_accumulation_steps=3, output_dir=str(tmp_path / "other"))
    assert by_batch.run.global_batch == 12
    assert by_batch.losses == small_run(other).losses


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 4}, {"global_batch_size": 16}])
def test_another_accumulation_in_accelerates_configuration_is_refused(small_args, monkeypatch, changes) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    args = small_args(**changes)
    with pytest.raises(ValueError, match="says gradient_accumulation_steps 1, and the arguments 4: make them equal"):
        start_run(args, "small")
    assert not Path(args.output_dir).exists()


def test_the_same_accumulation_there_is_no_contradiction(small_args, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert start_run(small_args(global_batch_size=16), "small").global_batch == 16


def test_what_preparing_changes_is_noticed_too() -> None:
    check_accumulation(SimpleNamespace(gradient_accumulation_steps=3), 3)
    with pytest.raises(ValueError, match="says gradient_accumulation_steps 8, and the arguments 3"):
        check_accumulation(SimpleNamespace(gradient_accumulation_steps=8), 3)


def test_both_as_flags_are_refused_though_one_is_at_its_default(tmp_path, capsys) -> None:
    (tmp_path / "run.yaml").write_text("pretrained_model_name_or_path: x\ntrain_file: y\nglobal_batch_size: 8\n")
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, ["--config", str(tmp_path / "run.yaml"), "--gradient_accumulation_steps", "1"])
    assert "gradient_accumulation_steps is 1 and global_batch_size 8" in capsys.readouterr().err
    flags = ["--gradient_accumulation_steps", "1", "--global_batch_size", "none"]
    args = parse_arguments(Arguments, ["--config", str(tmp_path / "run.yaml"), *flags])
    assert accumulation_steps(args, 3) == 1
