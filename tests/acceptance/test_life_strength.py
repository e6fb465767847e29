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
from tests.acceptance._by_hand import assert_near, disturb
from tests.acceptance._lives import frozen_sd, predict, save_lora
from tests.acceptance._twins import X, adapted, by_hand, lora_config, nara_config, run, two, with_second
from tests.helpers.rounding import assert_far

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


def test_schedule_is_linear_between_points_constant_outside_and_a_step_is_taken_from_its_lambda_on() -> None:
    levels = torch.linspace(0, 1, 101)
    torch.testing.assert_close(StrengthSchedule(POINTS)(levels).double(), interpolated(levels), rtol=0, atol=1e-6)
    found = StrengthSchedule(STEPS)(torch.tensor([0.0, 0.249, 0.25, 0.5, 0.699, 0.7, 1.0]))
    torch.testing.assert_close(found, torch.tensor([0.3, 0.3, 1.2, 1.2, 1.2, 0.0, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_the_strength_of_its_own_lambda_and_merged_that_of_the_merge(kind: str) -> None:
    model, default = adapted(KINDS[kind]), [["default"]] * 6
    whole = by_hand(model, default, LEVELS, x=INPUT)
    set_strength(model, "default", StrengthSchedule(POINTS))
    found = run(model, LEVELS, INPUT)
    assert_near(found, by_hand(model, default, LEVELS, {"default": interpolated(LEVELS)}, INPUT))
    assert_far(found, whole)
    with pytest.raises(ValueError, match="noise_level"):
        model(INPUT)
    expected = by_hand(model, default, [0.25] * 6, {"default": [0.5] * 6}, INPUT)
    with noise_level(model, 0.25):
        merged: Any = model.merge_and_unload()
    with torch.no_grad():
        assert_near(merged(INPUT), expected)
        assert_far(merged(INPUT), two()(INPUT))


@pytest.mark.parametrize("kind", ["LoRA", "NaRA"])
def test_two_adapters_have_a_schedule_each_and_no_gradient_where_it_is_zero(kind: str) -> None:
    model = adapted(KINDS[kind])
    if kind == "LoRA":
        model.add_adapter("other", lora_config(r=3, target_modules=["first"]))
        disturb(model, "other", seed=4)
    else:
        with_second(model)
    model.base_model.set_adapter(["default", "other"])
    set_strength(model, "default", StrengthSchedule(POINTS))
    set_strength(model, "other", StrengthSchedule(STEPS))
    strengths = {"default": interpolated(LEVELS), "other": torch.tensor([1.2, 0.3, 0.0, 1.2, 0.0, 1.2])}
    expected = by_hand(model, [["default", "other"]] * 6, LEVELS, strengths, INPUT)
    assert_near(run(model, LEVELS, INPUT), expected)
    model.set_adapter("other")
    for level, is_moved in ((0.8, False), (0.5, True)):
        model.zero_grad()
        with noise_level(model, level):
            model(INPUT).square().mean().backward()
        found = [0.0 if p.grad is None else float(p.grad.abs().max()) for p in model.parameters() if p.requires_grad]
        assert [bool(gradient) for gradient in found] == [is_moved] * len(found)


def test_set_adapters_takes_schedules_and_numbers_of_loras_beside_each_other(tmp_path: Path) -> None:
    pipes: list[Any] = [frozen_sd() for _ in range(3)]
    first = save_lora(tmp_path)
    second = save_lora(tmp_path, seed=6, r=2, lora_alpha=2, target_modules=["to_k", "conv1"])
    for pipe in pipes:
        pipe.load_lora_weights(first, adapter_name="a")
        pipe.load_lora_weights(second, adapter_name="b")
    pipes[0].set_adapters(["a", "b"], [StrengthSchedule(POINTS), 0.6])
    for level, pipe in zip(_lives.LEVELS, pipes[1:], strict=True):
        pipe.set_adapters(["a", "b"], [float(interpolated(torch.tensor([level]))), 0.6])
    low, high = (predict(pipe) for pipe in pipes[1:])
    found = predict(pipes[0])
    _lives.assert_near(found, torch.stack([low[0], high[1], low[2]]), pipes[0].unet)
    assert_far(found, torch.stack([high[0], low[1], high[2]]))
