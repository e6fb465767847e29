"""The suite of one picture: what it runs, and its table."""

from __future__ import annotations

from pathlib import Path

from quality.report.one_picture import one_picture_table
from quality.results import append
from quality.running import load_suite


def test_one_picture_table_counts_seeds_of_all_arms(tmp_path: Path) -> None:
    runs = [(100, "lora"), (402, "lora")]
    runs += [(seed, method) for seed in (400, 401) for method in ("lora", "tlora_residual")]
    records = []
    for seed, method in runs:
        similarity = 0.3 + (0.02 if method == "lora" else 0.0) + 0.01 * (seed - 400)
        figures = {"similarity": similarity, "text_alignment": 0.5, "place_similarity": 0.6, "validation_loss": 0.1}
        common = {"domain": "rank_64", "method": method, "seed": seed, "learning_rate": 0.001}
        records.append({**common, **figures, "trainable_parameters": 9000})
    append(tmp_path / "one_picture.jsonl", records)
    lines = one_picture_table(tmp_path).splitlines()
    assert lines[2].startswith("| lora, rank 64 | 2 | 0.001 | 9 k | 0.825 | 0.325 | 0.500 | 0.600 | 0.100 | ")
    assert "+0.020" in lines[2]
    assert lines[3].startswith("| tlora_residual, rank 64 | 2 | 0.001 | 9 k | 0.805 |")
    assert len(lines) == 4


def test_one_picture_suite_has_no_controls() -> None:
    suite = load_suite("one_picture")
    jobs = list(suite.jobs(suite.backbones, suite.domains, suite.methods, [400], {}))
    assert len(jobs) == 2 * 5
    assert {job.control for job in jobs} == {None}
    assert suite.rates("sdxl-tiny", "lora") == {}
