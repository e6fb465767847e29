"""Each benchmark runs through its `main` at its smallest size and writes its record."""

from __future__ import annotations

import json

import benchmark_alternatives
import benchmark_decoding
import benchmark_quality
import benchmark_regimes
import benchmark_speed
import measure_house
import pytest
from quality import results
from quality.regimes import alternatives
from quality.regimes.alternatives import Arm, Group
from quality.regimes.runs import FURTHER, REGIMES, Cell, Run, record_of

pytestmark = pytest.mark.slow
RUNS = {
    benchmark_speed: {"rounds": 2, "shape": (4, 8, 32), "rank": 5},
    benchmark_decoding: {"questions": 2, "steps": 2},
}
MADE_WITH = {"command", "hardware", "versions", "commit"}


@pytest.mark.parametrize("benchmark", RUNS, ids=lambda module: module.__name__)
def test_benchmark_writes_a_record(benchmark, tmp_path):
    assert benchmark.main(**RUNS[benchmark], output_dir=tmp_path)
    record = json.loads((tmp_path / f"{benchmark.__name__}.json").read_text(encoding="utf-8"))
    assert record.keys() > MADE_WITH


@pytest.mark.parametrize(
    ("modality", "domain", "settings"),
    [
        ("text", "code", ["steps=2", "batch_size=4", "sizes={train: 40, tuning: 10, validation: 15, test: 4}"]),
        ("images", "toy", ["max_train_steps=2", "num_validation_images=1", "num_inference_steps=2"]),
    ],
)
def test_benchmark_quality_writes_each_run_once(modality, domain, settings, tmp_path):
    path = tmp_path / "records.jsonl"
    asked = ["--modality", modality, "--domains", domain, "--methods", "lora", "nara", "--seeds", "0"]
    asked += ["--backbones", "llada-tiny"] if modality == "text" else []
    for _ in range(2):
        assert benchmark_quality.main([*asked, "--output", str(path), "--set", *settings]) == 0
    compared = [(record["method"], record["control"]) for record in results.read(path)]
    assert compared == [
        ("lora", None),
        ("nara", None),
        ("nara", "mean_core"),
        ("nara", "reversed"),
        ("nara", "constant"),
        ("nara", "shuffled"),
    ]


@pytest.mark.parametrize("regime", sorted({*REGIMES, *FURTHER} - {"noise_offset_gain"}))
def test_each_regime_trains_a_step_and_is_measured(regime):
    run = Run(Cell(regime, "attention", 2, 1), "nara", 0, {"learning_rate": 1e-2, "core_learning_rate": 1e-3})
    record = record_of(run, "dev")
    assert record.keys() > MADE_WITH
    assert record["score"] is None or record["score"] > 0
    assert len(record["losses"]) == 10


def test_benchmark_regimes_counts_what_is_left(tmp_path, capsys):
    assert benchmark_regimes.run(["--dry_run", "--regimes", "eps_to_v", "--output", str(tmp_path / "none.jsonl")]) == 0
    assert "120 runs of eps_to_v, attention, rank 4, 200 steps" in capsys.readouterr().out


def test_benchmark_alternatives_runs_what_is_missing_once(tmp_path, monkeypatch):
    token = Arm("token", Cell("blind_open_told", "attention", 4, 1), "lora", [{"learning_rate": 0.01}])
    monkeypatch.setattr(alternatives, "GROUPS", [Group("new", "", "blind_open", [token], [])])
    monkeypatch.setattr(alternatives, "RECORDS", tmp_path / "records.jsonl")
    monkeypatch.setattr(alternatives, "development", lambda: results.read(tmp_path / "records.jsonl"))
    monkeypatch.setattr(alternatives, "registered", lambda: ["new"])
    monkeypatch.setattr(alternatives, "SEEDS", (3, 4))
    monkeypatch.setattr(alternatives, "untried", lambda arm, known: [] if known else arm.grid)
    for stage in ("dev", "confirm", "confirm"):
        assert benchmark_alternatives.main(["--stage", stage, "--groups", "new"]) == 0
    made = results.read(tmp_path / "records.jsonl")
    assert [(record["stage"], record["seed"]) for record in made] == [("dev", 100), ("confirm", 3), ("confirm", 4)]
    assert {record["trainable_parameters"] for record in made} == {16384}
    monkeypatch.setattr(alternatives, "registered", lambda: ["none"])
    assert "not registered" in str(benchmark_alternatives.main(["--stage", "confirm"]))


def test_measure_house_counts_the_library(tmp_path):
    counted = measure_house.library()
    assert counted["library lines"] > counted["library statements"] / 2 > 0
