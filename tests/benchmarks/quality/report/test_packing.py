"""Packed results: everything that a table shows, in less room."""

import json

from quality.report.data import read_records
from quality.report.packing import KEPT, pack

from tests.benchmarks.quality.report.records import record, runs

DROPPED = {"job": "a long key", "date": "now"}
WHERE = {"commit": "abc123", "versions": {"torch": "2.13"}, "hardware": {"cores": 2}, **DROPPED}
RECORDS = [
    record("lora", 100, [0.375, 0.5], stage="tune", trial={"learning_rate": 0.1}, **WHERE),
    {**record("lora", 100, [1.0, 1.0], stage="tune", trial={"learning_rate": 1.0}, **WHERE), "validation_loss": None},
    *runs("lora", [1.0, 1.1], exact_match=0.25, **WHERE),
    record("nara", 0, [0.1234567890123, 2.0], validation_loss=1.0625, last=False, **WHERE),
    record("nara", 0, [0.5, 2.0], control="mean_core", last=True, **WHERE),
    record("nara", 0, [1, 1], stage="cost", step_ratio=1.5, step_ratio_quartiles=[1.25, 1.75], **WHERE),
]


def unpacked(tmp_path, records):
    path = tmp_path / "packed.jsonl"
    path.write_text("\n".join(pack(records)) + "\n")
    return read_records([path]), path


def test_packed_records_have_every_field_that_their_stage_shows(tmp_path):
    found, _ = unpacked(tmp_path, RECORDS)
    assert len(found) == len(RECORDS)
    for own, given in zip(found, RECORDS, strict=True):
        kept = {*KEPT[given["stage"]], "commit", "versions", "hardware", "control", "seed"}
        kept -= {"losses", "validation_error"}
        assert {name: own.get(name) for name in kept} == {name: given.get(name) for name in kept}
        assert not own.keys() & DROPPED.keys()


def test_fields_of_a_line_before_dont_stay(tmp_path):
    """A stage that doesn't show losses, and a run without exact match, has none, though the line before had."""
    found, _ = unpacked(tmp_path, RECORDS)
    assert "exact_match" in found[3]
    assert "exact_match" not in found[4]
    assert "losses" in found[5]
    assert "losses" not in found[6]
    assert [each.get("validation_loss") for each in found[:2]] == [0.4375, None]


def test_numbers_are_rounded_and_a_runs_time_stands_once(tmp_path):
    found, _ = unpacked(tmp_path, RECORDS)
    assert found[4]["losses"] == [0.123456789, 2.0]
    assert [each.get("seconds") for each in found[4:6]] == [None, 36.0]
    assert [each.get("validation_error") for each in found[2:5]] == [0.025, 0.025, None]


def test_what_repeats_stands_once(tmp_path):
    _, path = unpacked(tmp_path, runs("lora", [1.0] * 50, **WHERE))
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"form": "changes"}
    assert json.loads(lines[2]) == {"seed": 1}
    assert path.read_text().count("abc123") == 1


def test_packed_records_can_be_packed_again(tmp_path):
    found, path = unpacked(tmp_path, RECORDS)
    assert "\n".join(pack(found)) + "\n" == path.read_text()
