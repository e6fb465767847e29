"""Each example and benchmark runs through its `main`, as a newcomer would run it, or smaller where it measures."""

import importlib.util
import json
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_speed_records_all_that_is_needed_to_repeat_it(tmp_path, capsys):
    figures = load("benchmark_speed").main(rounds=3, shape=(4, 8, 32), rank=5, output_dir=tmp_path)
    record = json.loads((tmp_path / "benchmark_speed.json").read_text())
    assert record["ratios"] == figures["ratios"]
    assert set(record["ratios"]) == {"NaRA / LoRA", "NaRA-DoRA / DoRA"}
    assert all(ratio > 0 for kinds in record["ratios"].values() for ratio in kinds.values())
    assert {"command", "hardware", "versions", "commit"} <= set(record)
    assert record["versions"]["torch"]
    assert "NaRA-DoRA / DoRA, train: " in capsys.readouterr().out
