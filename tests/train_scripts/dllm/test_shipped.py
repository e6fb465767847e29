"""Without arguments train_scripts/dllm.py runs the shipped model on the shipped task."""

from pathlib import Path

import pytest

from nara_diffusion.training.arguments.cli import parse_arguments
from train_scripts.dllm import Arguments, main, shipped_run


def test_without_arguments_the_shipped_model_and_task_are_used() -> None:
    args = parse_arguments(Arguments, [], stand_in=shipped_run)
    assert (Path(args.pretrained_model_name_or_path) / "model.safetensors").is_file()
    assert all(Path(path).is_file() for path in (args.train_file, args.validation_file, args.test_file))
    assert len(Path(args.test_file).read_text().splitlines()) >= 200
    assert args.output_dir is None


def test_a_flag_wins_over_the_shipped_run() -> None:
    args = parse_arguments(Arguments, ["--learning_rate", "3e-3"], stand_in=shipped_run)
    assert (args.learning_rate, args.lr_scheduler, args.num_train_epochs) == (3e-3, "cosine", 3.2)


def test_ones_own_data_are_not_mixed_with_the_shipped_ones(data) -> None:
    args = parse_arguments(Arguments, ["--train_file", data["train_file"]], stand_in=shipped_run)
    assert args.pretrained_model_name_or_path.endswith("llada-tiny")
    assert (args.train_file, args.validation_file, args.test_file) == (data["train_file"], None, None)


def test_ones_own_model_gets_the_defaults_and_not_the_shipped_values(data) -> None:
    argv = ["--pretrained_model_name_or_path", "org/model", "--train_file", data["train_file"]]
    args = parse_arguments(Arguments, argv, stand_in=shipped_run)
    assert args == Arguments(pretrained_model_name_or_path="org/model", train_file=data["train_file"])
    assert args.learning_rate == 1e-4


@pytest.mark.slow
def test_the_shipped_model_learns_the_shipped_task(tmp_path) -> None:
    results = main(parse_arguments(Arguments, ["--output_dir", str(tmp_path / "run")], stand_in=shipped_run))
    assert results["n"] >= 200
    assert results["exact_match_before"] < 0.1
    assert results["exact_match_after"] > 0.6
