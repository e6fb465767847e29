"""Each example and benchmark runs through its `main`, as a newcomer would run it, or smaller where it measures."""

import json
import sys
from importlib import import_module  # the names of the examples start with their numbers

import pytest

from tests.helpers.small_pipelines import small_sdxl


def test_benchmark_speed_records_all_that_is_needed_to_repeat_it(tmp_path, capsys):
    figures = import_module("benchmark_speed").main(rounds=3, shape=(4, 8, 32), rank=5, output_dir=tmp_path)
    record = json.loads((tmp_path / "benchmark_speed.json").read_text())
    assert record["ratios"] == figures["ratios"]
    assert set(record["ratios"]) == {"NaRA / LoRA", "NaRA-DoRA / DoRA"}
    assert all(ratio > 0 for kinds in record["ratios"].values() for ratio in kinds.values())
    assert {"command", "hardware", "versions", "commit"} <= set(record)
    assert record["versions"]["torch"]
    assert "NaRA-DoRA / DoRA, train: " in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
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


def test_generation_example_shows_each_step_and_compares_ways(capsys):
    found = import_module("02_generate_with_llada").main(n=20)
    printed = capsys.readouterr().out
    assert "λ = 1.00   ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒" in printed
    assert "answer     tenalp" in printed
    forwards = {name: count for name, (_, count) in found.items()}
    assert forwards["one token a step"] == 12
    assert forwards["all at once"] == 1
    assert forwards["every token above 0.9"] < 12


def test_loss_over_noise_example_draws_its_picture(tmp_path, capsys):
    results = import_module("03_loss_over_noise").main(steps=2, n=8, output_dir=tmp_path)
    assert set(results) == {"before", "after"}
    assert "right answers: " in capsys.readouterr().out
    assert (tmp_path / "03_loss_over_noise.png").stat().st_size > 0


def test_several_adapters_example_trains_switches_and_merges(capsys):
    table = import_module("04_several_adapters").main(steps=2, n=4)
    assert set(table) == {"shift", "upper", "plain", "none"}
    printed = capsys.readouterr().out
    assert "merging without a noise level: λ is not known" in printed
    assert "merged at λ = 0.5" in printed


def test_benchmark_loss_variance_compares_the_four_ways(tmp_path):
    main = import_module("benchmark_loss_variance").main
    variances = main(questions=2, draws=4, steps=2, output_dir=tmp_path)["variances"]
    assert len(variances) == 4
    assert variances["independent"]["gradient_relative"] == 1
    assert all(found["gradient"] > 0 and found["loss"] > 0 for found in variances.values())
    assert (tmp_path / "benchmark_loss_variance.json").exists()


def test_pipeline_example_loads_samples_and_unloads(tmp_path, capsys):
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    example = import_module("05_load_nara_weights")
    found = example.main(model=tmp_path / "sdxl", steps=3, sample_steps=2, output_dir=tmp_path)
    assert list(found) == [0.0, 0.5, 1.0]
    assert len({tuple(image.tobytes() for image in images) for images in found.values()}) == 3
    printed = capsys.readouterr().out
    assert "active adapters: ['subject']" in printed
    assert "gives the base's pixels again: True" in printed
    assert (tmp_path / "05_load_nara_weights.png").stat().st_size > 0
    again = example.main(tmp_path / "05_load_nara_weights", tmp_path / "sdxl", sample_steps=2, output_dir=tmp_path)
    assert [image.tobytes() for image in again[1.0]] == [image.tobytes() for image in found[1.0]]


def test_own_core_example_trains_saves_and_loads_its_rotation(tmp_path, capsys):
    results = import_module("06_own_core").main(steps=2, n=8, output_dir=tmp_path)
    assert results["after"] == results["loaded"]
    assert "gives the same logits: True" in capsys.readouterr().out
    assert (tmp_path / "06_own_core.png").stat().st_size > 0
    assert '"core_type": "rotation"' in (tmp_path / "06_own_core" / "adapter_config.json").read_text()


def test_conversion_example_brings_its_scheduler_and_takes_it_back(tmp_path, capsys):
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    main = import_module("07_convert_a_model").main
    losses = main(model=tmp_path / "sdxl", steps=8, n=8, sample_steps=2, output_dir=tmp_path)
    assert losses["after"] < losses["before"]
    printed = capsys.readouterr().out
    assert "samples by DPMSolverMultistepScheduler, prediction: flow_prediction" in printed
    assert "samples by EulerDiscreteScheduler and gives the base's pixels again: True" in printed
    assert (tmp_path / "07_convert_a_model.png").stat().st_size > 0


def test_benchmark_fused_compares_time_and_memory_of_every_form_and_pass(tmp_path, capsys):
    module = import_module("benchmark_fused")
    cases = module.main({(2, 3, 8): (2,), (3, 32, 64): (4,)}, budget=0, output_dir=tmp_path)["cases"]
    assert json.loads((tmp_path / "benchmark_fused.json").read_text())["cases"] == cases
    assert [(case["form"], case["shape"][-1], case["pass"]) for case in cases] == [
        (form, width, kind) for form in module.FORMS for width in (8, 64) for kind in module.PASSES
    ]
    assert all(case["time_ratio"] > 0 and case["rounds"] == module.MIN_ROUNDS for case in cases)
    large = [case for case in cases if case["shape"][-1] == 64]
    output = 4 * 3 * 32 * 64
    assert all(case["peak_bytes"]["parts"] > case["peak_bytes"]["fused"] >= output for case in large)
    assert capsys.readouterr().out.count("NaRA-DoRA") == 4
