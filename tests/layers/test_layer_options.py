"""LoRA's options and half precision in the LoRA variants, against the formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, default_core, disturb, nara_config, relative_error
from tests.helpers.layers.formulas import LEVELS, TIGHT, convolution_by_hand, linear, linear_by_hand

# ---------------------------------------------------------------- LoRA's options


def test_lora_bias_is_scaled_and_not_turned_by_the_core():
    model = adapted(OneLayer(linear()), target_modules=["layer"], lora_bias=True)
    x = torch.randn(3, 6, 7)
    with noise_level(model, LEVELS):
        actual = model(x)
    bias = 6 / 4 * model.base_model.model.layer.lora_B["default"].bias.double()
    assert relative_error(actual, linear_by_hand(model, x, default_core(model, LEVELS)) + bias) < TIGHT


def test_lora_bias_of_a_convolution():
    model = adapted(OneLayer(nn.Conv2d(7, 5, 3)), target_modules=["layer"], lora_bias=True)
    x = torch.randn(3, 7, 6, 5)
    with noise_level(model, LEVELS):
        actual = model(x)
    bias = 6 / 4 * model.base_model.model.layer.lora_B["default"].bias.double().view(-1, 1, 1)
    assert relative_error(actual, convolution_by_hand(model, x, default_core(model, LEVELS)) + bias) < TIGHT


def test_rslora_scales_by_the_root_of_the_rank():
    model = adapted(OneLayer(linear()), target_modules=["layer"], use_rslora=True)
    x = torch.randn(3, 7)
    layer = model.base_model.model.layer
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    update = torch.einsum("or,brq,qi,bi->bo", B, default_core(model, LEVELS), A, x.double()) * 6 / math.sqrt(4)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), layer.get_base_layer()(x).double() + update) < TIGHT


def test_rank_pattern_reads_the_leading_block_and_alpha_pattern_its_own_scale():
    model = adapted(
        TwoLayers(), target_modules=["first", "second"], rank_pattern={"second": 6}, alpha_pattern={"first": 5}
    )
    core = default_core(model, LEVELS)
    assert core.shape == (3, 6, 6)
    x = torch.randn(3, 4, 7)
    inner = model.base_model.model

    def layer_by_hand(layer: Any, x: Tensor, C: Tensor, s: float) -> Tensor:
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        base = layer.get_base_layer()
        W = base.weight.double() + s * torch.einsum("or,brq,qi->boi", B, C, A)
        return torch.einsum("bli,boi->blo", x, W) + base.bias.double()

    hidden = torch.tanh(layer_by_hand(inner.first, x.double(), core[:, :4, :4], 5 / 4))
    expected = layer_by_hand(inner.second, hidden, core, 6 / 6)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), expected) < TIGHT


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_a_half_precision_base_keeps_float32_adapters_and_its_own_output_dtype(base_dtype, use_dora):
    model = adapted(OneLayer(linear()).to(base_dtype), target_modules=["layer"], use_dora=use_dora)
    adapters = {n: p.dtype for n, p in model.named_parameters() if "lora_" in n or "nara_core" in n}
    assert set(adapters.values()) == {torch.float32}
    x = torch.randn(3, 6, 7).to(base_dtype)
    with noise_level(model, LEVELS):
        actual = model(x)
    assert actual.dtype == base_dtype
    # the base product, DoRA's subtraction of the bias and the result are each rounded to eps / 2, and at most doubled
    error = relative_error(actual, linear_by_hand(model, x, default_core(model, LEVELS), use_dora))
    assert error < 3 * torch.finfo(base_dtype).eps


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision_read_a_float32_core(dtype, use_dora):
    config = nara_config(target_modules=["layer"], use_dora=use_dora)
    model = get_peft_model(OneLayer(linear()).to(dtype), config, autocast_adapter_dtype=False)
    disturb(model)
    dtypes = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert {t for n, t in dtypes.items() if "lora_" in n} == {dtype}
    assert {t for n, t in dtypes.items() if "nara_core" in n} == {torch.float32}
    x = torch.randn(3, 6, 7).to(dtype)
    with noise_level(model, LEVELS):
        actual = model(x)
    assert actual.dtype == dtype
    error = relative_error(actual, linear_by_hand(model, x, default_core(model, LEVELS), use_dora))
    assert error < 8 * torch.finfo(dtype).eps / 2  # h, B·C, W0 x, three sums and the result are rounded


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_autocast_rounds_products_but_not_the_core(use_dora):
    model = adapted(OneLayer(linear()), target_modules=["layer"], use_dora=use_dora)
    x = torch.randn(3, 6, 7)
    with noise_level(model, LEVELS), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(x)
    assert actual.dtype == torch.bfloat16
    error = relative_error(actual, linear_by_hand(model, x, default_core(model, LEVELS), use_dora))
    assert error < 8 * 2**-9  # x, W0, A, B·C, h and two sums are each rounded to 2⁻⁹
