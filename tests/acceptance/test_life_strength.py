"""A `StrengthSchedule` multiplies the update of a NaRA, a LoRA or a DoRA by s(λ), piecewise linear, a λ a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nara_diffusion import StrengthSchedule, noise_level, set_strength
from tests.acceptance import _lives
from tests.acceptance._lives import Lives, frozen_sd, predict, save_lora, save_nara
from tests.acceptance._twins import (
    X,
    adapted,
    assert_far,
    assert_near,
    by_hand,
    fill,
    lora_config,
    nara_config,
    run,
    two,
    with_second,
)

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

POINTS = [(0.1, 1.5), (0.4, -0.5), (0.8, 0.2)]
STEPS = [(0.25, 0.3), (0.25, 1.2), (0.7, 1.2), (0.7, 0.0)]
"""Below λ = .25 .3, from there 1.2, and from λ = .7 nothing."""
LEVELS = torch.tensor([0.33, 0.05, 0.93, 0.4, 0.7, 0.6])
INPUT = X.repeat(2, 1, 1) + torch.arange(6)[:, None, None] / 7
KINDS: dict[str, Any] = {
    "LoRA": lora_config(),
    "DoRA": lora_config(use_dora=True),
    "NaRA": nara_config(),
    "NaRA-DoRA": nara_config(use_dora=True),
}


def interpolated(levels: Tensor) -> Tensor:
    """POINTS by numpy, (b,) in float64."""
    places, values = zip(*POINTS, strict=True)
    return torch.from_numpy(np.interp(levels.double().numpy(), places, values))


def test_schedule_is_linear_between_its_points_and_constant_outside() -> None:
    levels = torch.linspace(0, 1, 101)
    found = StrengthSchedule(POINTS)(levels)
    torch.testing.assert_close(found.double(), interpolated(levels), rtol=0, atol=1e-6)


def test_two_points_at_one_lambda_are_a_step_that_is_taken_from_that_lambda_on() -> None:
    found = StrengthSchedule(STEPS)(torch.tensor([0.0, 0.249, 0.25, 0.5, 0.699, 0.7, 1.0]))
    torch.testing.assert_close(found, torch.tensor([0.3, 0.3, 1.2, 1.2, 1.2, 0.0, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_the_strength_of_its_own_lambda(kind: str) -> None:
    model = adapted(KINDS[kind])
    whole = by_hand(model, [["default"]] * 6, LEVELS, x=INPUT)
    set_strength(model, "default", StrengthSchedule(POINTS))
    strengths = {"default": interpolated(LEVELS)}
    expected = by_hand(model, [["default"]] * 6, LEVELS, strengths, INPUT)
    found = run(model, LEVELS, INPUT)
    assert_near(found, expected)
    assert_far(found, whole)
    with pytest.raises(ValueError, match="noise_level"):
        model(INPUT)


@pytest.mark.parametrize("kind", ["LoRA", "NaRA"])
def test_two_adapters_have_a_schedule_each(kind: str) -> None:
    model = adapted(KINDS[kind])
    if kind == "LoRA":
        model.add_adapter("other", lora_config(r=3, target_modules=["first"]))
        fill(model, "other", seed=4)
    else:
        with_second(model)
    model.base_model.set_adapter(["default", "other"])
    set_strength(model, "default", StrengthSchedule(POINTS))
    set_strength(model, "other", StrengthSchedule(STEPS))
    steps = torch.tensor([1.2, 0.3, 0.0, 1.2, 0.0, 1.2])
    expected = by_hand(
        model, [["default", "other"]] * 6, LEVELS, {"default": interpolated(LEVELS), "other": steps}, INPUT
    )
    assert_near(run(model, LEVELS, INPUT), expected)


@pytest.mark.parametrize("kind", ["LoRA", "NaRA"])
def test_adapter_gets_no_gradient_where_its_strength_is_zero(kind: str) -> None:
    model = adapted(KINDS[kind])
    set_strength(model, "default", StrengthSchedule(STEPS))

    def gradients(level: float) -> list[float]:
        model.zero_grad()
        with noise_level(model, level):
            model(INPUT).square().mean().backward()
        return [0.0 if p.grad is None else float(p.grad.abs().max()) for p in model.parameters() if p.requires_grad]

    assert not any(gradients(0.8))
    assert all(gradients(0.5))


@pytest.mark.parametrize("kind", ["LoRA", "NaRA", "NaRA-DoRA"])
def test_merged_at_a_lambda_it_has_the_strength_of_that_lambda(kind: str) -> None:
    model = adapted(KINDS[kind])
    set_strength(model, "default", StrengthSchedule(POINTS))
    expected = by_hand(model, [["default"]] * 6, [0.25] * 6, {"default": [0.5] * 6}, INPUT)
    with noise_level(model, 0.25):
        merged: Any = model.merge_and_unload()
    with torch.no_grad():
        assert_near(merged(INPUT), expected)
        assert_far(merged(INPUT), two()(INPUT))


# ---------------------------------------------------------------- in a pipeline


def test_set_adapters_takes_a_schedule_of_a_nara(tmp_path: Path) -> None:
    save_nara(tmp_path)
    lives = Lives().load(tmp_path, "toy")
    whole = lives.check()
    lives.nara.set_adapters("toy", StrengthSchedule(POINTS))
    for level, lora in zip(_lives.LEVELS, lives.loras, strict=True):
        lora.set_adapters("toy", float(interpolated(torch.tensor([level]))))
    found = lives.check()
    _lives.assert_far(found, whole)
    base = predict(frozen_sd())
    _lives.assert_near(lives.call(lambda pipe: pipe.disable_lora()).check(), base, lives.nara.unet)
    _lives.assert_near(lives.call(lambda pipe: pipe.enable_lora()).check(), found, lives.nara.unet)


def test_set_adapters_takes_schedules_and_numbers_of_loras_beside_each_other(tmp_path: Path) -> None:
    pipes: list[Any] = [frozen_sd() for _ in range(3)]
    first, second = (
        save_lora(tmp_path),
        save_lora(tmp_path, seed=6, r=2, lora_alpha=2, target_modules=["to_k", "conv1"]),
    )
    for pipe in pipes:
        pipe.load_lora_weights(first, adapter_name="a")
        pipe.load_lora_weights(second, adapter_name="b")
    pipes[0].set_adapters(["a", "b"], [StrengthSchedule(POINTS), 0.6])
    for level, pipe in zip(_lives.LEVELS, pipes[1:], strict=True):
        pipe.set_adapters(["a", "b"], [float(interpolated(torch.tensor([level]))), 0.6])
    low, high = (predict(pipe) for pipe in pipes[1:])
    found = predict(pipes[0])
    _lives.assert_near(found, torch.stack([low[0], high[1], low[2]]), pipes[0].unet)
    _lives.assert_far(found, torch.stack([high[0], low[1], high[2]]))
