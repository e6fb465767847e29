"""Each benchmark of the code runs through its `main` at a small size, and writes its record."""

import json
import sys

import benchmark_export
import benchmark_fused
import benchmark_load
import benchmark_loss_memory
import benchmark_loss_variance
import benchmark_speed
import pytest

from nara_diffusion.layers import fused


def test_benchmark_speed_records_all_that_is_needed_to_repeat_it(tmp_path, capsys):
    figures = benchmark_speed.main(rounds=3, shape=(4, 8, 32), rank=5, output_dir=tmp_path)
    record = json.loads((tmp_path / "benchmark_speed.json").read_text())
    assert record["ratios"] == figures["ratios"]
    assert set(record["ratios"]) == {"NaRA / LoRA", "NaRA-DoRA / DoRA"}
    assert all(ratio > 0 for kinds in record["ratios"].values() for ratio in kinds.values())
    assert {"command", "hardware", "versions", "commit"} <= set(record)
    assert record["versions"]["torch"]
    assert "NaRA-DoRA / DoRA, train: " in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_export_finds_knots_exact(tmp_path):
    figures = benchmark_export.main(counts=(5,), cores=("knots",), output_dir=tmp_path)
    assert json.loads((tmp_path / "benchmark_export.json").read_text())["figures"] == figures
    trained = figures.pop("sdxl-tiny, toy-nara")
    assert trained["bins"]["5"]["mean update"] < 0.9 * trained["bins"]["5"]["samples, mean update"]
    assert trained["bins"]["5"]["mean update"] < trained["best"]["mean"]
    assert figures.keys() == {"llada-tiny, knots", "sdxl-tiny, knots"}
    for found in figures.values():
        assert found["exact"] < 1e-6
        assert found["bins"]["5"]["worst update"] < 1e-6
        assert found["best"]["worst"] > 0.1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_benchmark_loss_memory_gives_the_same_loss_both_ways(tmp_path):
    figures = benchmark_loss_memory.main(vocabulary=4096, batch=2, length=256, output_dir=tmp_path)
    record = json.loads((tmp_path / "benchmark_loss_memory.json").read_text())
    ways = figures["ways"]
    assert record["ways"] == ways
    assert ways["masked positions in chunks"]["loss"] == pytest.approx(ways["all positions"]["loss"], rel=1e-5)


def test_benchmark_loss_variance_compares_the_four_ways(tmp_path):
    main = benchmark_loss_variance.main
    variances = main(questions=2, draws=4, steps=2, output_dir=tmp_path)["variances"]
    assert len(variances) == 4
    assert variances["independent"]["gradient_relative"] == 1
    assert all(found["gradient"] > 0 and found["loss"] > 0 for found in variances.values())
    assert (tmp_path / "benchmark_loss_variance.json").exists()


def test_benchmark_fused_compares_time_and_memory_of_every_form_and_pass(tmp_path, capsys):
    before = fused.MIN_ELEMENTS
    cases = benchmark_fused.main({(2, 3, 8): (2,), (3, 32, 64): (4,)}, budget=0, output_dir=tmp_path)["cases"]
    assert before == fused.MIN_ELEMENTS  # small layers are fused in the tests after this one, too
    assert json.loads((tmp_path / "benchmark_fused.json").read_text())["cases"] == cases
    assert [(case["form"], case["shape"][-1], case["pass"]) for case in cases] == [
        (form, width, kind) for form in benchmark_fused.FORMS for width in (8, 64) for kind in benchmark_fused.PASSES
    ]
    assert all(case["time_ratio"] > 0 and case["rounds"] == benchmark_fused.MIN_ROUNDS for case in cases)
    large = [case for case in cases if case["shape"][-1] == 64]
    output = 4 * 3 * 32 * 64
    assert all(case["peak_bytes"]["parts"] > case["peak_bytes"]["fused"] >= output for case in large)
    assert capsys.readouterr().out.count("NaRA-DoRA") == 4


@pytest.mark.slow
def test_benchmark_load_finds_memory_after_swaps_as_it_was(tmp_path, capsys):
    narrow = {
        "block_out_channels": (32, 32, 32),
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
        "layers_per_block": 1,
    }
    figures = benchmark_load.main(rounds=2, rank=3, swaps=2, output_dir=tmp_path, **narrow)
    record = json.loads((tmp_path / "benchmark_load.json").read_text())
    assert record["ratio"] == figures["ratio"] > 0
    assert figures["memory"]["before"]["tensors"] == figures["memory"]["after"]["tensors"] > 0
    assert "NaRA / LoRA: " in capsys.readouterr().out
