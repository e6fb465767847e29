"""The command, as somebody types it."""

from importlib import import_module

import pytest
from quality.report.data import Arm, Grid, read_records, select
from quality.report.names import LOSS
from quality.results import read

SMALL = ["--set", "steps=2", "batch_size=4", "sizes={train: 40, tuning: 10, validation: 15, test: 4}"]
FEW = ["--backbones", "llada-tiny", "--domains", "code", "--tune_domains", "code", "--methods", "lora", "nara", *SMALL]


def main(*argv):
    return import_module("benchmark_quality").main(list(map(str, argv)))


def test_one_command_tunes_and_compares_and_does_nothing_twice(tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    assert main(*FEW, "--seeds", 0, "--output", path) == 0
    records = read(path)
    tried, runs = ([record for record in records if record["stage"] == stage] for stage in ("tune", "main"))
    assert len(tried) == 14  # seven trials each of two methods
    compared = [(record["method"], record["control"]) for record in runs]
    assert compared == [
        ("lora", None), ("nara", None), ("nara", "mean_core"), ("nara", "reversed"), ("nara", "constant"),
        ("nara", "shuffled"),
    ]  # fmt: skip
    assert {record["n"] for record in runs} == {15}
    best = min(select(tried, method="lora"), key=lambda record: record["validation_loss"])
    assert runs[0]["learning_rate"] == best["learning_rate"]
    grid = Grid.of(select(read_records([path]), stage="main"))  # as the report reads them
    assert grid.per_seed(Arm("nara", "mean_core"), LOSS) == {0: runs[2]["validation_loss"]}
    assert main(*FEW, "--seeds", 0, "--output", path) == 0
    assert read(path) == records
    capsys.readouterr()
    assert main(*FEW, "--seeds", 0, 1, "--output", path, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "tune: 0 of 14 runs left" in printed
    assert "main: 4 of 8 runs left" in printed
    assert "    main llada-tiny code nara constant 1" in printed


def test_dry_run_lists_all_stages_without_a_file(tmp_path, capsys):
    stages = ("tune", "main", "single", "ablation", "cost")
    assert main("--stages", *stages, "--output", tmp_path / "none.jsonl", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if not line.startswith(" ")] == list(stages)
    assert not (tmp_path / "none.jsonl").exists()


def test_packed_results_are_refused_as_output(tmp_path):
    """Their lines are differences: a whole record after them would take fields from the line before it."""
    path = tmp_path / "packed.jsonl"
    path.write_text('{"form": "changes"}\n{"suite": "text"}\n')
    with pytest.raises(ValueError, match=r"packed\.jsonl holds packed results: choose another --output"):
        main(*FEW, "--output", path, "--dry_run")
    assert path.read_text().count("\n") == 2


def test_untuned_runs_try_no_rates(tmp_path, capsys):
    assert main(*FEW, "--untuned", "--output", tmp_path / "none.jsonl", "--dry_run") == 0
    assert capsys.readouterr().out.startswith("main: 20 of 20 runs left")
    with pytest.raises(SystemExit):
        main(*FEW, "--untuned", "--stages", "tune", "main", "--dry_run")
    assert "--stages has tune: leave out one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "lorra"], "--methods has lorra, expected of full, lora"),
        (["--domains", "maths"], "--domains has maths, expected of commonsense, arithmetic, code"),
        (["--backbones", "bert"], "--backbones has bert, expected of llada-tiny, dream-tiny"),
        (["--set", "rank"], "--set has 'rank', expected NAME=VALUE"),
        (["--shard", "2/2"], "shard is '2/2', expected k/N"),
    ],
)
def test_wrong_arguments_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        main(*argv, "--dry_run")


def test_an_error_is_one_line_for_people(monkeypatch):
    module = import_module("benchmark_quality")
    assert module.run(["--dry_run", "--methods", "lorra"]).startswith("error: --methods has lorra, expected of full")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load_suite", interrupted)
    assert module.run(["--dry_run"]) == "stopped; give the same command again to go on"


def test_help_teaches_the_stages(capsys):
    with pytest.raises(SystemExit):
        main("--help")
    printed = capsys.readouterr().out
    for word in ("tune", "main", "single", "ablation", "mean_core", "reversed", "--shard", "--modality"):
        assert word in printed
