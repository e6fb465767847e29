"""The stage "cost": steps of a method and of LoRA in turn."""

import itertools
from importlib import import_module

import pytest
from quality.results import read
from quality.step_cost import PAIRS, WARM_UP, Step, Training, compared, cost_record


def training(name, order, seconds, number=PAIRS + WARM_UP):
    for second in itertools.islice(seconds, number):
        order.append(name)
        yield Step(1.0, second)


def test_steps_take_turns_and_the_ratio_is_of_pairs():
    order = []
    slow = itertools.chain([9.0] * WARM_UP, itertools.cycle([0.2, 0.4, 0.6]))  # a machine that's busy now and then
    quiet = itertools.chain([0.1] * WARM_UP, itertools.cycle([0.1, 0.2, 0.3]))
    found = compared(training("own", order, slow), training("lora", order, quiet))
    assert order == ["own", "lora"] * (WARM_UP + PAIRS)
    assert found == {"step_ms": 400.0, "baseline_step_ms": 200.0, "step_ratio": 2.0, "step_ratio_quartiles": [2.0, 2.0]}


def test_too_few_steps_are_refused():
    short = training("own", [], itertools.repeat(1.0), WARM_UP + 3)
    with pytest.raises(ValueError, match=f"too few steps to be timed: expected {WARM_UP + PAIRS} at least"):
        compared(short, training("lora", [], itertools.repeat(1.0)))


def test_a_record_has_the_ratios_of_sizes():
    own = {"method": "nara", "trainable_parameters": 300, "peak_memory_mib": 5.0}
    other = {"method": "lora", "trainable_parameters": 200, "peak_memory_mib": 4.0}
    steps = [training(name, [], itertools.repeat(0.1)) for name in ("own", "lora")]
    found = cost_record(Training(own, steps[0]), Training(other, steps[1]))
    assert (found["parameters_ratio"], found["memory_ratio"], found["step_ratio"]) == (1.5, 1.25, 1.0)
    assert found["method"] == "nara"
    assert found["validation_loss"] is None


@pytest.mark.parametrize("modality", ["text", "images"])
def test_the_command_measures_methods_beside_lora(modality, tmp_path, monkeypatch):
    monkeypatch.setattr("quality.step_cost.PAIRS", 8)
    path = tmp_path / "cost.jsonl"
    backbone, domain = {"text": ("llada-tiny", "code"), "images": ("sdxl-tiny", "toy")}[modality]
    options = ["--backbones", backbone, "--domains", domain, "--methods", "nara_knots_dora", "--set", "rank=2"]
    main = import_module("benchmark_quality").main
    assert main(["--modality", modality, "--stages", "cost", "--output", str(path), *options]) == 0
    (record,) = read(path)
    assert (record["stage"], record["method"], record["rank"]) == ("cost", "nara_knots_dora", 2)
    assert record["parameters_ratio"] > 1.2  # DoRA's magnitudes, and the knots; LoRA has rank 2 as well
    assert record["parameters_ratio"] < 2
    assert record["step_ratio"] > 1
    assert main(["--modality", modality, "--stages", "cost", "--output", str(path), *options]) == 0
    assert read(path) == [record]
