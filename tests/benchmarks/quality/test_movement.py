"""What is noted of a core in training, against values by hand."""

from __future__ import annotations

import math
from pathlib import Path

import benchmark_core_movement
import pytest
import torch
from peft import get_peft_model
from quality.movement import LEVELS, agreement, look, pull_on, shape_of_core

from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers, nara_config


def two_layers(**changes: object) -> torch.nn.Module:
    torch.manual_seed(3)
    return get_peft_model(
        TwoLayers(), nara_config(r=2, target_modules=["first", "second"], core_type="knots", core_scale=1.0, **changes)
    )


def test_a_fresh_core_is_the_identity() -> None:
    shape = shape_of_core(two_layers())
    assert shape == {"deviation": 0, "spread": 0, "smallest_singular_value": 1, "largest_singular_value": 1}


def test_deviation_and_spread_of_a_core_that_is_linear_in_the_noise_level() -> None:
    model = two_layers(core_knots=2)
    (deviation,) = (p for name, p in model.named_parameters() if "nara_core" in name)
    with torch.no_grad():
        deviation[1] = torch.diag(torch.tensor([3.0, 4.0]))  # C(λ) = I + λ diag(3, 4), of Frobenius norm 5 λ
    shape = shape_of_core(model)
    assert shape["deviation"] == pytest.approx(5 * LEVELS.mean().item() / math.sqrt(2))
    assert shape["spread"] == pytest.approx(5 * (LEVELS - LEVELS.mean()).abs().mean().item() / math.sqrt(2))
    assert shape["smallest_singular_value"] == pytest.approx(1 + 3 * LEVELS[0].item())
    assert shape["largest_singular_value"] == pytest.approx(1 + 4 * LEVELS[-1].item())


def test_gradients_of_the_core_and_of_a_and_b_are_told_apart() -> None:
    model = two_layers(core_sharing="layer")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = 2.0 if "nara_core" in name else 3.0 if "lora_A" in name else 4.0
            parameter.grad = torch.full_like(parameter, value)
    assert pull_on(model) == {"gradient_core": 2, "gradient_A": 3, "gradient_B": 4, "size_B": 0}


def test_layers_that_pull_in_opposite_directions_disagree() -> None:
    model = two_layers(core_sharing="layer")
    first, second = (p for name, p in model.named_parameters() if "nara_core" in name)
    first.grad = torch.randn_like(first)
    second.grad = -3 * first.grad
    assert agreement(model) == pytest.approx(-1)
    assert agreement(two_layers()) is None


def test_a_look_after_a_backward_has_all_of_it() -> None:
    model = two_layers(core_sharing="layer")
    with noise_level(model, 0.4):
        model(torch.ones(2, 3, 7)).sum().backward()
    assert look(model, 5).keys() >= {"step", "deviation", "spread", "gradient_core", "gradient_B", "agreement"}


@pytest.mark.slow
def test_the_benchmark_writes_record_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = benchmark_core_movement.main(domain="ab", rank=2, steps=2, every=2, output_dir=tmp_path)
    assert figures["rank"] == 2
    assert set(figures["traces"]) == set(benchmark_core_movement.ARMS)
    assert all([look["step"] for look in looks] == [1, 2] for looks in figures["traces"].values())
    assert {file.name for file in tmp_path.iterdir()} == {"benchmark_core_movement.json", "benchmark_core_movement.png"}
    assert "NaRA-Knots" in capsys.readouterr().out
