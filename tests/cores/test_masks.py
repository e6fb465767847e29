"""T-LoRA's rank mask and Multi-LoRA's bins at every timestep, and which directions they train."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.cores.simple import BinsCore, RankMaskCore
from tests.helpers.adapted import OneLayer, adapted, lora_config, relative_error

STEPS = 1000
GRID = torch.arange(STEPS + 1) / STEPS  # every λ that a discrete schedule of 1000 steps can have, and 1


def test_active_rank_at_every_timestep_is_that_of_integers() -> None:
    for rank in [1, 2, 5, 16, 33, 64, 100, 320, 999]:
        steps = torch.arange(STEPS + 1)
        levels = (GRID, 1 - (STEPS - steps) / STEPS, steps * (1 / STEPS))  # three roundings of t / 1000
        for least in {1, 2, rank // 3, rank // 2, rank - 1, rank} & set(range(1, rank + 1)):
            expected = (rank - least) * (STEPS - steps) // STEPS + least
            for level in levels:
                assert torch.equal(RankMaskCore(rank, least).active_rank(level).long(), expected), least


def test_chosen_bin_at_every_timestep_is_that_of_integers() -> None:
    steps = torch.arange(STEPS + 1)
    for bins in range(1, 129):
        expected = (steps * bins // STEPS).clamp(max=bins - 1)
        assert torch.equal(BinsCore(bins, bins).chosen_bin(GRID).long(), expected), bins


def gradients(model: PeftModel, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    output = model(x)
    output.square().sum().backward()
    layer = model.base_model.model.layer
    return output, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad


@pytest.mark.parametrize(("level", "start"), [(0.1, 0), (0.5, 2), (1.0, 4)])
def test_bin_is_pefts_lora_of_its_rank_and_trains_as_one(level: float, start: int) -> None:
    base, other = OneLayer(nn.Linear(7, 5)), OneLayer(nn.Linear(7, 5))
    other.load_state_dict(base.state_dict())
    model = adapted(base, target_modules=["layer"], core_type="bins", core_bins=3, r=6, lora_alpha=3 * 5)
    layer, block = model.base_model.model.layer, slice(start, start + 2)
    lora = get_peft_model(other, lora_config(target_modules=["layer"], r=2, lora_alpha=5))
    lora.base_model.model.layer.lora_A["default"].weight.data.copy_(layer.lora_A["default"].weight[block])
    lora.base_model.model.layer.lora_B["default"].weight.data.copy_(layer.lora_B["default"].weight[:, block])
    x = torch.randn(3, 7)
    with noise_level(model, level):
        output, grad_A, grad_B = gradients(model, x)
    expected, lora_A, lora_B = gradients(lora, x)
    assert relative_error(output, expected) < 2e-6
    assert relative_error(grad_A[block], lora_A) < 5e-6
    assert relative_error(grad_B[:, block], lora_B) < 5e-6
    outside = [i for i in range(6) if not start <= i < start + 2]
    assert not grad_A[outside].any()
    assert not grad_B[:, outside].any()


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_samples_of_one_batch_train_their_own_bins(use_dora: bool) -> None:
    model = adapted(
        OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type="bins", core_bins=2, use_dora=use_dora
    )
    x = torch.randn(2, 3, 7)
    for levels, active in (([0.1, 0.9], [1, 1, 1, 1]), ([0.1, 0.3], [1, 1, 0, 0]), ([0.7, 0.9], [0, 0, 1, 1])):
        model.zero_grad()
        with noise_level(model, torch.tensor(levels)):
            _, grad_A, grad_B = gradients(model, x)
        assert grad_A.any(1).tolist() == grad_B.any(0).tolist() == [bool(flag) for flag in active]
