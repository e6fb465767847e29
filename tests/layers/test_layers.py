"""Adapted layers beside the formula: biases of B, odd batches, refused kinds, orthonormal starts, DoRA's norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.layers.functional import factored_row_norm
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, disturb, lora_config, nara_config, relative_error

LEVELS = torch.tensor([0.05, 0.5, 0.93])
DORA = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(7, 5), (3, 6, 7)), (nn.Conv2d(7, 5, 3), (3, 7, 6, 5))], ids=str
)
def test_bias_of_b_is_scaled_and_not_turned_by_the_core(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = adapted(OneLayer(layer), target_modules=["layer"], lora_bias=True), torch.randn(shape)
    bias = model.base_model.model.layer.lora_B["default"].bias
    with noise_level(model, LEVELS):
        with_bias = model(x)
        expected = 6 / 4 * bias.detach().clone().view(-1, *(1,) * (len(shape) - 3 if len(shape) == 4 else 0))
        bias.data.zero_()
        difference = with_bias - model(x)
    rows = expected.view(1, 5, 1, 1) if len(shape) == 4 else expected
    torch.testing.assert_close(difference, rows.expand_as(difference), rtol=1e-4, atol=1e-5)


@DORA
def test_sample_without_batch_axis_is_a_batch_of_one(use_dora: bool) -> None:
    for layer, shape in [(nn.Linear(7, 5), (7,)), (nn.Conv2d(7, 5, 3), (7, 6, 6)), (nn.Conv1d(7, 5, 3), (7, 6))]:
        model, x = adapted(OneLayer(layer), target_modules=["layer"], use_dora=use_dora), torch.randn(shape)
        with noise_level(model, 0.3):
            torch.testing.assert_close(model(x), model(x[None])[0], rtol=1e-5, atol=1e-6)


def test_batch_that_the_layer_sees_otherwise_is_refused_by_name() -> None:
    model = adapted(TwoLayers(), target_modules=["first"])
    with noise_level(model, LEVELS), pytest.raises(ValueError, match=r"3 values, but the batch.*'first' is 6"):
        model(torch.randn(6, 7))


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


class ScaledEmbedding(nn.Embedding):
    """As Gemma 3 has it: what is looked up is multiplied by a constant."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def test_scaled_and_padded_embedding_with_a_new_core_is_pefts() -> None:
    ids, found = torch.randint(13, (3, 6)), []
    for config in (lora_config, nara_config):
        torch.manual_seed(2)
        model = get_peft_model(OneLayer(ScaledEmbedding(13, 5, padding_idx=2)), config(target_modules=["layer"]))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        if config is nara_config:
            with noise_level(model, LEVELS):
                output = model(ids)
        else:
            output = model(ids)
        output.square().sum().backward()
        found.append([output, *(p.grad for name, p in model.named_parameters() if "lora_" in name)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@DORA
@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(7, 5), (3, 4, 7)), (nn.Conv1d(7, 5, 3), (3, 7, 6))], ids=str)
def test_float64_model_computes_in_float64_beside_the_float32_core(layer: Any, shape: Any, use_dora: bool) -> None:
    model, x = (
        adapted(OneLayer(layer.double()), target_modules=["layer"], use_dora=use_dora),
        torch.randn(shape).double(),
    )
    own: Any = model.base_model.model.layer
    A, B = (factor["default"].weight.flatten(1) for factor in (own.lora_A, own.lora_B))
    W = layer.weight.flatten(1) + 6 / 4 * B @ core_matrix(model, LEVELS).double() @ A
    if use_dora:
        W = own.lora_magnitude_vector["default"].weight.view(-1, 1) * W / W.norm(dim=2, keepdim=True)
    apply = nn.functional.linear if isinstance(layer, nn.Linear) else nn.functional.conv1d
    rows = [apply(x[i : i + 1], W[i].view(layer.weight.shape), layer.bias) for i in range(3)]
    with noise_level(model, LEVELS):
        assert relative_error(model(x), torch.cat(rows)) < 1e-14


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


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(7, 5), (3, 7)),
        (lambda: nn.Conv2d(7, 5, 3), (3, 7, 6, 6)),
        (lambda: nn.Embedding(13, 5), None),
    ],
    ids=["linear", "convolution", "embedding"],
)
def test_orthogonal_start_has_orthonormal_directions_and_is_the_base_at_every_level(make: Any, shape: Any) -> None:
    base, x = OneLayer(make()), torch.randint(13, (3, 6)) if shape is None else torch.randn(shape)
    expected = base(x)
    model = get_peft_model(base, nara_config(target_modules=["layer"], core_type="rank_mask", lora_a_init="orthogonal"))
    own = model.base_model.model.layer
    rows = own.lora_embedding_B["default"].T if shape is None else own.lora_A["default"].weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-6)
    with noise_level(model, torch.tensor([0.0, 0.5, 1.0])):
        assert torch.equal(model(x), expected)


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


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_dora_makes_no_update_matrix_of_each_sample(training: bool) -> None:
    model = adapted(OneLayer(nn.Linear(96, 80)), target_modules=["layer"], use_dora=True)
    x = torch.randn(4, 3, 96, requires_grad=True)
    with noise_level(model, torch.linspace(0.1, 0.9, 4)), LargestTensor() as largest:
        output = model.train(training)(x)
        if training:
            output.sum().backward()
    assert math.prod(largest.shape) <= 80 * 96, largest.shape


def test_dora_norm_at_llada_width_is_exact_to_float32() -> None:
    W0, A, K = torch.randn(512, 768) * 0.02, torch.randn(32, 768) * 0.02, torch.randn(4, 512, 32)
    exact = (W0.double() + 0.5 * K.double() @ A.double()).norm(dim=2)
    assert relative_error(factored_row_norm(W0, A, K, 0.5), exact) < 1e-6
