"""Each example and benchmark runs through its `main`, as a newcomer would run it, or smaller where it measures."""

import json
from importlib import import_module  # the names of the examples start with their numbers

import pytest


def test_benchmark_speed_records_all_that_is_needed_to_repeat_it(tmp_path, capsys):
    figures = import_module("benchmark_speed").main(rounds=3, shape=(4, 8, 32), rank=5, output_dir=tmp_path)
    record = json.loads((tmp_path / "benchmark_speed.json").read_text())
    assert record["ratios"] == figures["ratios"]
    assert set(record["ratios"]) == {"NaRA / LoRA", "NaRA-DoRA / DoRA"}
    assert all(ratio > 0 for kinds in record["ratios"].values() for ratio in kinds.values())
    assert {"command", "hardware", "versions", "commit"} <= set(record)
    assert record["versions"]["torch"]
    assert "NaRA-DoRA / DoRA, train: " in capsys.readouterr().out


def test_benchmark_loss_memory_gives_the_same_loss_both_ways(tmp_path):
    figures = import_module("benchmark_loss_memory").main(vocabulary=4096, batch=2, length=256, output_dir=tmp_path)
    record = json.loads((tmp_path / "benchmark_loss_memory.json").read_text())
    ways = figures["ways"]
    assert record["ways"] == ways
    assert ways["masked positions in chunks"]["loss"] == pytest.approx(ways["all positions"]["loss"], rel=1e-5)


def test_first_example_moves_the_points_and_keeps_them_when_saved(tmp_path, capsys):
    results = import_module("01_first_nara_adapter").main(steps=300, output_dir=tmp_path)
    assert results["after"] < results["before"]
    printed = capsys.readouterr().out
    assert "gives the ring again: True" in printed
    assert "gives the same points: True" in printed
    assert (tmp_path / "01_first_nara_adapter.png").stat().st_size > 0
