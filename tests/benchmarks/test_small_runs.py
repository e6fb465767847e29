"""Each benchmark runs through its `main` at its smallest size and writes its record."""

from __future__ import annotations

import json

import benchmark_batches
import benchmark_cache
import benchmark_decoding
import benchmark_few_steps
import benchmark_quality
import benchmark_regimes
import benchmark_speed
import benchmark_text_cache
import benchmark_text_steps
import benchmark_text_training
import measure_house
import pytest
import torch
from benchmark_record import for_terminal
from PIL import Image
from quality import results
from quality.regimes.runs import FURTHER, REGIMES, Cell, Run, record_of

from nara_flags.training import TrainingArguments

pytestmark = pytest.mark.slow
RUNS = {
    benchmark_speed: {"rounds": 2, "shape": (4, 8, 32), "rank": 5},
    benchmark_cache: {"steps": 1, "rounds": 1, "lengths": (32,)},
    benchmark_batches: {"records": 100},
    benchmark_decoding: {"questions": 2, "steps": 2},
}
MADE_WITH = {"command", "hardware", "versions", "commit"}


@pytest.mark.parametrize("benchmark", RUNS, ids=lambda module: module.__name__)
def test_benchmark_writes_a_record(benchmark, tmp_path):
    assert benchmark.main(**RUNS[benchmark], output_dir=tmp_path)
    record = json.loads((tmp_path / f"{benchmark.__name__}.json").read_text(encoding="utf-8"))
    assert record.keys() > MADE_WITH


@pytest.mark.parametrize("part", ["quality", "speed"])
def test_benchmark_text_cache_writes_a_record(part, tmp_path):
    benchmark_text_cache.main(part, questions=2, steps=2, rounds=1, width=24, layers=1, output_dir=tmp_path)
    record = json.loads((tmp_path / f"benchmark_text_cache_{part}.json").read_text(encoding="utf-8"))
    assert record.keys() > MADE_WITH


@pytest.mark.parametrize("part", ["blocks", "sampling"])
def test_benchmark_text_steps_writes_a_record(part, tmp_path):
    benchmark_text_steps.main(part, rounds=1, answer=64, output_dir=tmp_path)
    record = json.loads((tmp_path / f"benchmark_text_{part}.json").read_text(encoding="utf-8"))
    assert record.keys() > MADE_WITH


def test_benchmark_text_training_writes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_text_training, "BATCHES", ((8, 4),))
    figures = benchmark_text_training.main(rounds=1, output_dir=tmp_path)
    assert set(figures["table"][0]["ratios"]) == {"random", "bare loop"}
    record = json.loads((tmp_path / "benchmark_text_training.json").read_text(encoding="utf-8"))
    assert record.keys() > MADE_WITH


def test_benchmark_cache_makes_same_tokens_in_each_way(tmp_path):
    models = benchmark_cache.main(steps=2, rounds=1, lengths=(96,), output_dir=tmp_path)["models"]
    assert models["llada2"]["lengths"]["96"]["same_tokens"] == {"each step": 1.0}
    assert models["diffusion_gemma"]["lengths"]["96"]["same_tokens"] == {"each step": 1.0, "each block": 1.0}


@pytest.mark.parametrize(
    ("modality", "domain", "settings"),
    [
        (
            "text",
            "code",
            ["max_train_steps=2", "train_batch_size=4", "sizes={train: 40, tuning: 10, validation: 15, test: 4}"],
        ),
        ("images", "toy", ["max_train_steps=2", "num_validation_images=1", "num_inference_steps=2"]),
    ],
)
def test_benchmark_quality_writes_each_run_once(modality, domain, settings, tmp_path):
    path = tmp_path / "records.jsonl"
    flags = ["--modality", modality, "--domains", domain, "--methods", "lora", "nara", "--seeds", "0"]
    flags += ["--backbones", "llada-tiny"] if modality == "text" else []
    for _ in range(2):
        assert benchmark_quality.main([*flags, "--output", str(path), "--set", *settings]) == 0
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


@pytest.mark.usefixtures("committed")
def test_benchmark_regimes_makes_each_remaining_run_once(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    of_regime = ["--regimes", "eps_to_v", "--output", str(path)]
    for seed in ("0", "0", "1"):
        assert benchmark_regimes.main([*of_regime, "--methods", "base", "--seeds", seed]) == 0
    assert [(record["arm"], record["seed"]) for record in results.read(path)] == [("base", 0), ("base", 1)]
    capsys.readouterr()
    benchmark_regimes.main([*of_regime, "--dry_run"])
    benchmark_regimes.main(["--alternatives", "blind_determined_all", "--output", str(path), "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "120 runs of eps_to_v, attention, rank 4, 200 steps"
    assert sum(int(line.split()[0]) for line in lines[1:]) == 50
    assert "more" in str(for_terminal(lambda: benchmark_regimes.main(["--regimes", "one_image"])))


@pytest.mark.usefixtures("committed")
def test_benchmark_few_steps_runs_an_arm_once(tmp_path):
    path = tmp_path / "few.jsonl"
    flags = ["--arms", "DoRA each step", "--steps", "2", "--seeds", "40", "--output", str(path)]
    assert benchmark_few_steps.main(["--stage", "dev", *flags]) == 0
    assert benchmark_few_steps.main(["--stage", "dev", *flags]) == 0
    records = results.read(path)
    assert [record["rates"]["learning_rate"] for record in records] == [1e-3, 2.5e-3, 4e-3, 6e-3]
    assert all(0 < record["score"] < 2 for record in records)
    assert benchmark_few_steps.main(["--stage", "confirm", *flags]) == 0
    assert results.read(path)[-1]["rates"] == min(records, key=lambda record: record["score"])["rates"]
    with pytest.raises(ValueError, match="lacks trials"):
        benchmark_few_steps.main(["--stage", "confirm", "--output", str(path), "--arms", "LoRA"])


def test_benchmark_few_steps_gives_named_parameters_their_rate():
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(3, 2), "lora_B": torch.nn.Linear(2, 3)})
    args = TrainingArguments(pretrained_model_name_or_path="base", learning_rate=0.1)
    with benchmark_few_steps.own_rates({"b_learning_rate": 0.5}):
        optimizer = benchmark_few_steps.loop.build_optimizer(model, args)
    rate_of = {id(trained): group["lr"] for group in optimizer.param_groups for trained in group["params"]}
    rates = {name: rate_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert rates == {"lora_A.weight": 0.1, "lora_A.bias": 0.1, "lora_B.weight": 0.5, "lora_B.bias": 0.5}


def test_benchmark_few_steps_measures_what_a_step_costs():
    lora, dora = benchmark_few_steps.measure_costs("sd-tiny-flow", ["LoRA", "Knots-DoRA"], "narrow", rounds=2)
    assert lora["ratio"] == 1 < dora["ratio"]
    assert 4 * 100_000 < lora["peak"] < dora["peak"]  # more than the gradients


def test_benchmark_few_steps_samples_base_and_draws_results(tmp_path):
    path, pictures = tmp_path / "few.jsonl", tmp_path / "grid"
    flags = ["--output", str(path), "--pictures", str(pictures)]
    assert benchmark_few_steps.main(["--stage", "samplers", "--seeds", "40", *flags]) == 0
    ends = {(record["arm"], record["calls"], record["guidance"]): record["end"] for record in results.read(path)}
    assert len(ends) == 12
    assert benchmark_few_steps.main(["--report", *flags]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 12 * 64


def test_measure_house_counts_the_library(tmp_path):
    counted = measure_house.library()
    assert counted["library lines"] > counted["library statements"] / 2 > 0
