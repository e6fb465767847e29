"""s(λ) · C(λ) on every kind of layer, for NaRAs and LoRAs, beside the formula in float64; and its gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from nara_diffusion import noise_level, set_strength
from tests.helpers.adapted import OneLayer, TwoLayers, relative_error
from tests.helpers.layers.formulas import CONVOLUTIONS, LINEARS, TIGHT, convolution_by_hand, linear_by_hand
from tests.strength.models import ADAPTERS, LEVELS, SCHEDULE, adapted_by, core_at, strength_by_hand

DORA = pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
KINDS = pytest.mark.parametrize("kind", ADAPTERS)


def core_of(model: Any, kind: str) -> torch.Tensor:
    return core_at(model, kind, LEVELS, group="layer" if kind == "knots a layer" else "shared")


@KINDS
@DORA
@pytest.mark.parametrize("layer", LINEARS)
def test_linear_layers_have_the_strength_of_each_sample(kind, use_dora, layer):
    options = {"use_dora": use_dora, "fan_in_fan_out": layer == "transformers Conv1D"}
    model = adapted_by(kind, OneLayer(LINEARS[layer]()), target_modules=["layer"], **options)
    set_strength(model, "default", SCHEDULE)
    x = torch.randn(3, 6, 7)
    with noise_level(model, LEVELS):
        y = model(x)
    assert relative_error(y, linear_by_hand(model, x, core_of(model, kind), use_dora)) < TIGHT


@KINDS
@DORA
@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_convolutions_have_the_strength_of_each_sample(kind, use_dora, layer):
    make, shape = CONVOLUTIONS[layer]
    model = adapted_by(kind, OneLayer(make()), target_modules=["layer"], use_dora=use_dora)
    set_strength(model, "default", SCHEDULE)
    x = torch.randn(shape)
    with noise_level(model, LEVELS):
        y = model(x)
    assert relative_error(y, convolution_by_hand(model, x, core_of(model, kind), use_dora)) < TIGHT


@KINDS
def test_embeddings_have_the_strength_of_each_sample(kind):
    model = adapted_by(kind, OneLayer(nn.Embedding(13, 5)), target_modules=["layer"])
    set_strength(model, "default", SCHEDULE)
    ids = torch.randint(13, (3, 6))
    with noise_level(model, LEVELS):
        y = model(ids)
    layer = model.base_model.model.layer
    A, B = layer.lora_embedding_A["default"].double(), layer.lora_embedding_B["default"].double()
    update = 6 / 4 * torch.einsum("or,brq,qbl->blo", B, core_of(model, kind), A[:, ids])
    assert relative_error(y, layer.base_layer.weight.double()[ids] + update) < TIGHT


@DORA
@pytest.mark.parametrize("kind", ["LoRA", "NaRA"])
def test_gradients_are_the_sum_of_those_at_each_sample_s_number(kind, use_dora):
    torch.manual_seed(4)
    model = adapted_by(kind, TwoLayers(), target_modules=["first", "second"], use_dora=use_dora)
    x, weight = torch.randn(3, 7), torch.randn(3, 5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    for i, strength in enumerate(strength_by_hand(LEVELS).tolist()):
        set_strength(model, "default", strength)
        model.zero_grad()
        with noise_level(model, LEVELS[i : i + 1]) if kind == "NaRA" else nullcontext():
            (model(x[i : i + 1]) * weight[i]).sum().backward()
        for name, p in trained.items():
            expected[name] += p.grad
    model.zero_grad()
    set_strength(model, "default", SCHEDULE)
    with noise_level(model, LEVELS):
        (model(x) * weight).sum().backward()
    assert any("nara_core" in name for name in expected) == (kind == "NaRA")
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert relative_error(trained[name].grad, gradient) < 2e-5, name


def test_one_level_for_a_batch_gives_all_samples_its_strength():
    model = adapted_by("LoRA", OneLayer(nn.Linear(7, 5)), target_modules=["layer"])
    set_strength(model, "default", SCHEDULE)
    x = torch.randn(3, 7)
    with noise_level(model, 0.33):
        y = model(x)
    core = core_at(model, "LoRA", torch.full((3,), 0.33))
    assert relative_error(y, linear_by_hand(model, x, core)) < TIGHT


def test_layers_of_other_ranks_read_the_leading_block():
    model = adapted_by("LoRA", TwoLayers(), target_modules=["first", "second"], rank_pattern={"second": 2})
    x = torch.randn(3, 7)
    outputs = []
    for i, strength in enumerate(strength_by_hand(LEVELS).tolist()):
        set_strength(model, "default", strength)
        outputs.append(model(x[i : i + 1]))
    set_strength(model, "default", SCHEDULE)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), torch.cat(outputs)) < TIGHT


def test_dropout_drops_what_it_drops_at_a_number():
    model = adapted_by("LoRA", OneLayer(nn.Linear(7, 5)), target_modules=["layer"], lora_dropout=0.4).train()
    x = torch.randn(3, 7)
    outputs = []
    for strength in (float(SCHEDULE(0.33)), SCHEDULE):
        set_strength(model, "default", strength)
        torch.manual_seed(8)
        if strength is SCHEDULE:
            with noise_level(model, 0.33):
                outputs.append(model(x))
        else:
            outputs.append(model(x))
    assert relative_error(*outputs) < TIGHT
