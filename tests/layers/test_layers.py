"""Adapted layers beside the formula: biases of B, idle experts, refused kinds, orthonormal starts, DoRA's norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import noise_level
from nara_diffusion.layers.functional import factored_row_norm
from tests.acceptance._by_hand import (
    ALPHA,
    LEVELS,
    RANK,
    Kinds,
    adapted,
    disturb,
    draw_inputs,
    nara_config,
    tensors_of,
    write,
)
from tests.helpers.adapted import OneLayer, relative_error

DORA = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])


def test_bias_of_b_is_scaled_and_not_turned_by_the_core() -> None:
    kinds = ["linear", "conv2d"]
    model, inputs = adapted(Kinds(kinds), target_modules=kinds, lora_bias=True), draw_inputs(kinds)
    biases = {name: tensor.clone() for name, tensor in tensors_of(model).items() if name.endswith("lora_B.bias")}
    with noise_level(model, LEVELS):
        found = model(inputs)
        write(model, {name: 0 * bias for name, bias in biases.items()})
        without = model(inputs)
    for name, output in found.items():
        bias = ALPHA / RANK * biases[f"{name}.lora_B.bias"]
        expected = bias.view(-1, 1, 1) if "conv" in name else bias
        torch.testing.assert_close(output - without[name], expected.expand_as(output), rtol=1e-4, atol=1e-5)


class Mixture(nn.Module):
    """Two experts, of which the second gets no row; the router's own layer sees the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.busy, self.idle = nn.Linear(7, 7), nn.Linear(7, 5), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.router(x)
        return self.busy(x) + self.idle(x.flatten(0, -2)[:0]).sum()


@DORA
def test_idle_expert_beside_layers_with_a_level_per_sample_gets_gradients_of_zero(use_dora: bool) -> None:
    model: Any = get_peft_model(Mixture(), nara_config(target_modules=["router", "busy", "idle"], use_dora=use_dora))
    disturb(model)
    with noise_level(model, LEVELS):
        model(torch.randn(3, 4, 7)).square().sum().backward()
    for name, is_zero in (("router", False), ("busy", False), ("idle", True)):
        layer = getattr(model.base_model.model, name)
        for factor in (layer.lora_A, layer.lora_B):
            assert (factor["default"].weight.grad.count_nonzero() == 0) == is_zero, name


# ---------------------------------------------------------------------- kinds that are refused, and starts


class OwnForward(lora.Linear):
    """A layer of one's own that PEFT uses, and that calls no variant."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.MultiheadAttention(8, 2), {}, r"NaRA cannot adapt 'layer' \(MultiheadAttention\).*exclude_modules"),
        (nn.Linear(7, 5), {"custom": {nn.Linear: OwnForward}}, r"'layer' \(Linear, adapted by PEFT's OwnForward\)"),
        (nn.Embedding(13, 5), {"use_dora": True}, r"NaRA-DoRA cannot adapt 'layer' \(Embedding\), .*norm"),
        (nn.Conv2d(8, 8, 3, groups=2), {"use_dora": True}, r"NaRA-DoRA cannot adapt 'layer' \(Conv2d\), .*groups"),
        (nn.Linear(7, 5).to(torch.float8_e4m3fn), {"use_dora": True}, "stored as torch.float8_e4m3fn"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layer_that_can_have_no_variant_is_refused_by_name_and_left(layer: Any, options: Any, message: str) -> None:
    base, custom = OneLayer(layer), options.pop("custom", None)
    config = nara_config(target_modules=["layer"], **options)
    if custom is not None:
        config._register_custom_module(custom)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert base.layer is layer
    assert [name for name, _ in base.named_modules()] == [name for name, _ in OneLayer(layer).named_modules()]


def test_orthogonal_start_has_orthonormal_directions_and_is_the_base_at_every_level() -> None:
    kinds = ["linear", "conv2d", "embedding"]
    base, inputs = Kinds(kinds), draw_inputs(kinds)
    expected = base(inputs)
    model = get_peft_model(base, nara_config(target_modules=kinds, core_type="rank_mask", lora_a_init="orthogonal"))
    directions = {name: t for name, t in tensors_of(model).items() if name.endswith(("lora_A.weight", "embedding_B"))}
    assert len(directions) == 6
    for name, tensor in directions.items():
        rows = tensor.T if "embedding" in name else tensor.flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-6)
    with noise_level(model, torch.tensor([0.0, 0.5, 1.0])):
        outputs = model(inputs)
    assert all(torch.equal(output, expected[name]) for name, output in outputs.items())


# ---------------------------------------------------------------------- DoRA's norm


class LargestTensor(TorchDispatchMode):
    """Records the shape of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() > math.prod(self.shape):
                self.shape = tuple(tensor.shape)
        return result


def test_dora_makes_no_update_matrix_of_each_sample() -> None:
    model = adapted(OneLayer(nn.Linear(96, 80)), target_modules=["layer"], use_dora=True)
    x = torch.randn(4, 3, 96, requires_grad=True)
    with noise_level(model, torch.linspace(0.1, 0.9, 4)), LargestTensor() as largest:
        model.train()(x).sum().backward()
    assert math.prod(largest.shape) <= 80 * 96, largest.shape


def test_dora_norm_at_llada_width_is_exact_to_float32() -> None:
    W0, A, K = torch.randn(512, 768) * 0.02, torch.randn(32, 768) * 0.02, torch.randn(4, 512, 32)
    exact = (W0.double() + 0.5 * K.double() @ A.double()).norm(dim=2)
    assert relative_error(factored_row_norm(W0, A, K, 0.5), exact) < 1e-6
