"""T-LoRA's rank mask and Multi-LoRA's bins against their formulas, what they train, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig, core_matrix, noise_level
from nara_diffusion.cores.rank_masks import BinsCore, RankMaskCore
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, lora_config, nara_config, relative_error

STEPS = 1000
GRID = torch.arange(STEPS + 1) / STEPS  # every λ that a discrete schedule of 1000 steps can have, and 1


def make(core_type: str, **changes: Any) -> PeftModel:
    return adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type=core_type, **changes)


def active_rank(step: int, rank: int, least: int) -> int:
    """⌊(r − r_min)(T − t) / T⌋ + r_min, in exact numbers."""
    return math.floor((rank - least) * (1 - Fraction(step, STEPS))) + least


def chosen_bin(step: int, bins: int) -> int:
    return min(math.floor(Fraction(step, STEPS) * bins), bins - 1)


@pytest.mark.parametrize(("rank", "least"), [(4, 1), (6, None), (8, 8), (1, None), (10, 3)])
def test_the_rank_mask_is_t_loras_at_every_timestep(rank, least):
    model = make("rank_mask", r=rank, rank_mask_min=least)
    floor = max(1, rank // 2) if least is None else least
    expected = torch.zeros(STEPS + 1, rank, rank)
    for step in range(STEPS + 1):
        for i in range(active_rank(step, rank, floor)):
            expected[step, i, i] = 1
    assert torch.equal(core_matrix(model, GRID), expected)


def test_active_rank_at_every_rank_and_timestep_is_that_of_exact_fractions():
    steps = torch.arange(STEPS + 1)
    levels = {"t / T": GRID, "1 - (T - t) / T": 1 - (STEPS - steps) / STEPS, "t · (1 / T)": steps * (1 / STEPS)}
    for rank in range(1, 33):
        for least in range(1, rank + 1):
            core = RankMaskCore(rank, least)
            expected = [active_rank(step, rank, least) for step in range(STEPS + 1)]
            for rounding, level in levels.items():
                assert core.active_rank(level).tolist() == expected, (rank, least, rounding)


@pytest.mark.parametrize("rank", [33, 64, 100, 128, 320, 512, 999])
def test_active_rank_of_high_ranks_is_that_of_integers(rank):
    steps = torch.arange(STEPS + 1)
    for least in range(1, rank + 1):
        expected = (rank - least) * (STEPS - steps) // STEPS + least
        assert torch.equal(RankMaskCore(rank, least).active_rank(GRID).long(), expected), (rank, least)


def test_chosen_bin_at_every_number_of_bins_and_timestep_is_that_of_exact_fractions():
    for bins in range(1, 129):
        expected = [chosen_bin(step, bins) for step in range(STEPS + 1)]
        assert BinsCore(bins, bins).chosen_bin(GRID).tolist() == expected, bins


@pytest.mark.parametrize(("rank", "bins"), [(4, 4), (10, 5), (6, 1), (8, 2), (30, 10)])
def test_a_bin_has_its_own_block_at_every_timestep(rank, bins):
    model = make("bins", r=rank, core_bins=bins)
    expected, size = torch.zeros(STEPS + 1, rank, rank), rank // bins
    for step in range(STEPS + 1):
        for i in range(size):
            index = chosen_bin(step, bins) * size + i
            expected[step, index, index] = 1
    assert torch.equal(core_matrix(model, GRID), expected)
    assert torch.equal(core_matrix(model, GRID).sum((1, 2)), torch.full((STEPS + 1,), float(size)))


@pytest.mark.parametrize("options", [{"core_type": "rank_mask"}, {"core_type": "bins", "core_bins": 2}], ids=str)
def test_masks_have_no_parameters_and_need_lambda(options):
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], **options)
    assert not [name for name in model.state_dict() if "nara_core" in name]
    with pytest.raises(ValueError, match=r"λ is not known, but adapter\(s\) 'default' depend on it"):
        model(torch.randn(2, 7))


def lora_of_block(model: PeftModel, base: nn.Module, block: slice, alpha: float) -> PeftModel:
    """PEFT's own LoRA with the given rows of A and columns of B."""
    layer = model.base_model.model.layer
    A, B = layer.lora_A["default"].weight[block], layer.lora_B["default"].weight[:, block]
    lora = get_peft_model(base, lora_config(target_modules=["layer"], r=len(A), lora_alpha=alpha))
    lora.base_model.model.layer.lora_A["default"].weight.data.copy_(A)
    lora.base_model.model.layer.lora_B["default"].weight.data.copy_(B)
    return lora


@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_a_bin_is_pefts_lora_of_its_rank_and_trains_as_one(level):
    torch.manual_seed(0)
    base = OneLayer(nn.Linear(7, 5))
    other = OneLayer(nn.Linear(7, 5))
    other.load_state_dict(base.state_dict())
    model = adapted(base, target_modules=["layer"], core_type="bins", core_bins=3, r=6, lora_alpha=3 * 5)
    block = slice(2 * chosen_bin(int(level * STEPS), 3), 2 * chosen_bin(int(level * STEPS), 3) + 2)
    lora = lora_of_block(model, other, block, alpha=5)
    x, target = torch.randn(3, 7), torch.randn(3, 5)

    def gradients(model: PeftModel) -> tuple[Tensor, Tensor, Tensor]:
        output = model(x)
        (output - target).square().sum().backward()
        layer = model.base_model.model.layer
        return output, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad

    with noise_level(model, level):
        output, grad_A, grad_B = gradients(model)
    expected, lora_A, lora_B = gradients(lora)
    assert relative_error(output, expected) < 2e-6
    assert relative_error(grad_A[block], lora_A) < 5e-6
    assert relative_error(grad_B[:, block], lora_B) < 5e-6
    others = [i for i in range(6) if not block.start <= i < block.stop]
    assert torch.equal(grad_A[others], torch.zeros(4, 7))
    assert torch.equal(grad_B[:, others], torch.zeros(5, 4))


@pytest.mark.parametrize("use_dora", [False, True])
def test_samples_of_one_batch_train_their_own_blocks(use_dora):
    model = make("bins", core_bins=2, use_dora=use_dora)
    layer = model.base_model.model.layer
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 3, 7)
    gradients = []
    for levels in (torch.tensor([0.1, 0.9]), torch.tensor([0.1, 0.3]), torch.tensor([0.7, 0.9])):
        with noise_level(model, levels):
            model(x).square().sum().backward()
        gradients.append((A.grad.abs().sum(1) > 0, B.grad.abs().sum(0) > 0))
        model.zero_grad()
    for (rows, columns), active in zip(gradients, ([1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]), strict=True):
        assert rows.tolist() == columns.tolist() == [bool(flag) for flag in active]


def test_adamw_leaves_blocks_alone_that_never_had_a_gradient_but_its_momentum_moves_trained_ones():
    model = make("bins", core_bins=2)
    A = model.base_model.model.layer.lora_A["default"].weight
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)

    def step(level: float) -> Tensor:
        before = A.detach().clone()
        with noise_level(model, level):
            model(torch.ones(2, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return (A.detach() - before).abs().sum(1) > 0

    assert step(0.1).tolist() == [True, True, False, False]
    assert step(0.1).tolist() == [True, True, False, False]
    assert step(0.9).tolist() == [True, True, True, True]  # the running mean of the first block's gradients


def test_layers_of_other_ranks_have_masks_of_their_own_rank():
    model = adapted(
        TwoLayers(), target_modules=["first", "second"], r=4, rank_pattern={"second": 2}, core_type="bins", core_bins=2
    )
    assert torch.equal(core_matrix(model, 0.9, module="first")[0], torch.diag(torch.tensor([0.0, 0, 1, 1])))
    assert torch.equal(core_matrix(model, 0.9, module="second")[0], torch.diag(torch.tensor([0.0, 1])))
    masked = adapted(
        TwoLayers(), target_modules=["first", "second"], r=4, rank_pattern={"second": 2}, core_type="rank_mask"
    )
    assert core_matrix(masked, 1.0, module="first")[0].diag().tolist() == [1, 1, 0, 0]
    assert core_matrix(masked, 1.0, module="second")[0].diag().tolist() == [1, 0]
    x = torch.randn(3, 7)
    first, second = model.base_model.model.first, model.base_model.model.second

    def by_hand(layer: Any, h: Tensor, block: slice) -> Tensor:
        A, B = layer.lora_A["default"].weight.double()[block], layer.lora_B["default"].weight.double()[:, block]
        return layer.get_base_layer()(h.float()).double() + layer.scaling["default"] * h.double() @ A.T @ B.T

    expected = by_hand(second, torch.tanh(by_hand(first, x, slice(2, 4))), slice(1, 2))
    with noise_level(model, 0.9):
        assert relative_error(model(x), expected) < 5e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"core_type": "bins", "r": 8}, "r is 8, which 5 bins cannot share evenly: .*pass core_bins times the rank"),
        ({"core_type": "bins", "r": 10, "rank_pattern": {"a": 4}}, "r is 4, which 5 bins cannot share evenly"),
        ({"core_type": "bins", "core_bins": 0}, "core_bins is 0: pass a positive integer"),
        ({"core_type": "rank_mask", "r": 4, "rank_mask_min": 5}, "rank_mask_min is 5, with .*r=4"),
        ({"core_type": "rank_mask", "rank_mask_min": 0}, "rank_mask_min is 0"),
        ({"core_type": "rank_mask", "rank_mask_min": True}, "rank_mask_min is True"),
        ({"rank_mask_min": 2}, "rank_mask_min is 2, with core_type='hypernetwork' .*it is for core_type='rank_mask'"),
        (
            {"core_type": "rank_mask", "init_lora_weights": "pissa"},
            "init_lora_weights='pissa' needs C = I at step 0, which core_type='rank_mask' does not promise",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NaraConfig(**fields)


def test_a_fresh_mask_leaves_the_base_model_as_it_is():
    base = OneLayer(nn.Linear(7, 5))
    x = torch.randn(3, 7)
    expected = base(x)
    model = get_peft_model(base, nara_config(target_modules=["layer"], core_type="rank_mask"))
    with noise_level(model, torch.tensor([0.0, 0.5, 1.0])):
        assert torch.equal(model(x), expected)
