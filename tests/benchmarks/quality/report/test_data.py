"""Paired differences: by hand, over seeds, after the mean over domains; and what can't be pooled."""

import json

import pytest
from quality.report.data import Arm, Grid, below_zero, clear_of_zero, read_records
from quality.report.names import LOSS

from tests.benchmarks.quality.report.records import record, runs

LORA, NARA = Arm("lora"), Arm("nara")


def test_the_interval_is_students_over_differences_within_seeds():
    grid = Grid.of([*runs("lora", [1.0, 2.0, 3.0]), *runs("nara", [0.5, 1.7, 2.2])])
    found = grid.difference(NARA, LORA, LOSS)  # −0.5, −0.3, −0.8: mean −8/15, s² = 0.19/3
    half = 4.302652730 * (0.19 / 3) ** 0.5 / 3**0.5
    assert found is not None
    assert found.mean == pytest.approx(-8 / 15)
    assert (found.low, found.high) == pytest.approx((-8 / 15 - half, -8 / 15 + half))
    assert not clear_of_zero(found)  # half is 0.625


def test_sides_of_zero():
    grid = Grid.of([*runs("lora", [1.0, 2.0, 3.0]), *runs("nara", [0.51, 1.5, 2.49])])
    below, above = grid.difference(NARA, LORA, LOSS), grid.difference(LORA, NARA, LOSS)
    assert [below_zero(below), clear_of_zero(below)] == [True, True]
    assert [below_zero(above), clear_of_zero(above)] == [False, True]
    assert [below_zero(None), clear_of_zero(None)] == [False, False]


def test_domains_are_averaged_within_a_seed_and_incomplete_seeds_are_left_out():
    records = [*runs("lora", [1.0, 2.0, 3.0]), *runs("lora", [5.0, 6.0], domain="arithmetic")]
    grid = Grid.of(records)
    assert grid.per_seed(LORA, LOSS) == {0: 3.0, 1: 4.0}
    assert grid.per_seed(LORA, LOSS, ["code"]) == {0: 1.0, 1: 2.0, 2: 3.0}
    assert grid.difference(NARA, LORA, LOSS) is None
    assert grid.spread(NARA, LOSS) is None


def test_a_difference_needs_two_seeds_that_both_have():
    grid = Grid.of([record("lora", 0, [1, 1]), record("lora", 1, [1, 1]), record("nara", 1, [2, 2])])
    assert grid.difference(NARA, LORA, LOSS) is None


def test_a_value_that_a_record_lacks_leaves_its_seed_out():
    grid = Grid.of([record("lora", 0, [1, 1], exact_match=None), record("lora", 1, [1, 1], exact_match=0.5)])
    assert grid.per_seed(LORA, lambda found: found["exact_match"]) == {1: 0.5}


def test_a_repeated_run_counts_once_and_a_control_is_another_arm():
    grid = Grid.of(
        [record("nara", 0, [1, 1]), record("nara", 0, [3, 3]), record("nara", 0, [9, 9], control="constant")]
    )
    assert grid.per_seed(NARA, LOSS) == {0: 3.0}
    assert grid.arms == [NARA, Arm("nara", "constant")]


def test_seeds_of_different_settings_arent_pooled():
    records = [record("nara", 0, [1, 1]), record("nara", 1, [1, 1], learning_rate=0.02)]
    with pytest.raises(ValueError, match=r"nara on code was run with different settings, .*learning_rate.*\(seed 1\)"):
        Grid.of(records)
    with pytest.raises(ValueError, match="core_scale"):
        Grid.of([record("nara", 0, [1, 1]), record("nara", 1, [1, 1], settings={"core_scale": 1.0})])


def test_broken_files_are_named(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps(record("lora", 0, [1, 1])) + "\n{oh\n")
    with pytest.raises(ValueError, match=r"text\.jsonl, line 2 is no JSON"):
        read_records([file])
    file.write_text('{"suite": "text"}\n')
    with pytest.raises(ValueError, match=r"line 1 lacks stage, backbone, domain, method, seed"):
        read_records([file])
    with pytest.raises(ValueError, match="no results: run examples/benchmarks/benchmark_quality"):
        read_records([])
