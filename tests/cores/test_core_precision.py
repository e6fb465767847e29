"""The core stays in float32, whatever casts the model: PyTorch, autocast, or Diffusers layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import core_matrix, noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, disturb, lora_config, nara_config, relative_error
from tests.helpers.pipelines.unet import tiny_unet

LEVELS = torch.tensor([0.0, 0.31, 0.77, 1.0])

# ---------------------------------------------------------------- float32 always

CASTS = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to(dtype=, device=)": lambda model: model.to(device="cpu", dtype=torch.float16),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("noise_embedding", ["fourier", "mlp"])
def test_no_cast_of_the_model_reaches_the_core(noise_embedding, cast):
    model = adapted(TwoLayers(), target_modules=["first"], noise_embedding=noise_embedding)
    before = core_matrix(model, LEVELS)
    cast(model)
    state = {n: t for n, t in model.state_dict().items() if "nara_core" in n}
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert torch.equal(core_matrix(model, LEVELS), before)
    dtype = model.base_model.model.first.get_base_layer().weight.dtype
    with noise_level(model, LEVELS):
        assert model(torch.randn(4, 3, 7, dtype=dtype)).dtype == dtype


def test_gradients_follow_the_core_in_float32():
    model = adapted(TwoLayers(), target_modules=["first"])
    with noise_level(model, 0.5):
        model(torch.randn(2, 7)).sum().backward()
    model.to(torch.bfloat16)
    assert {p.grad.dtype for n, p in model.named_parameters() if "nara_core" in n} == {torch.float32}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("core_type", ["hypernetwork", "constant"])
def test_the_default_dtype_of_torch_does_not_reach_the_core(core_type, default):
    torch.set_default_dtype(default)
    try:
        model = adapted(TwoLayers(), target_modules=["first"], core_type=core_type)
        assert {t.dtype for n, t in model.state_dict().items() if "nara_core" in n} == {torch.float32}
        assert core_matrix(model, 0.5).dtype == torch.float32
        with noise_level(model, 0.5):
            assert model(torch.randn(2, 7)).dtype == default
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_does_not_round_the_core():
    model = adapted(TwoLayers(), target_modules=["first"])
    exact = core_matrix(model, LEVELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(core_matrix(model, LEVELS), exact)


# ---------------------------------------------------------------- float64

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), F.linear, (3, 4, 7)),
    "convolution": (lambda: nn.Conv1d(7, 5, 3), F.conv1d, (3, 7, 6)),
}


def weights_by_hand(model: PeftModel, levels: Tensor) -> Tensor:
    """W(λ) (b, d_out, d_in, …) from the factors in float64; C alone is rounded to float32."""
    layer: Any = model.base_model.model.layer  # type: ignore[union-attr]
    A, B = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
    base = layer.get_base_layer().weight
    assert {tensor.dtype for tensor in (A, B, base)} == {torch.float64}
    update = 6 / 4 * torch.einsum("or,brs,si->boi", B.flatten(1), core_matrix(model, levels).double(), A.flatten(1))
    rows = base.flatten(1) + update  # (b, d_out, k)
    if model.peft_config["default"].use_dora:  # type: ignore[attr-defined]
        magnitude = layer.lora_magnitude_vector["default"].weight.flatten()
        rows = magnitude[:, None] * rows / rows.square().sum(2, keepdim=True).sqrt()
    return rows.view(-1, *base.shape).detach()


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize(("make", "apply", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_float64_model_computes_and_merges_in_float64(make, apply, shape, use_dora, dropout):
    levels = torch.tensor([0.1, 0.5, 0.9])
    model = adapted(OneLayer(make().double()), target_modules=["layer"], use_dora=use_dora, lora_dropout=dropout)
    base = model.base_model.model.layer.get_base_layer()
    x = torch.randn(shape, dtype=torch.float64)

    def by_hand(levels: Tensor) -> Tensor:
        weights = weights_by_hand(model, levels).expand(3, *base.weight.shape)
        return torch.stack([apply(x[i : i + 1], weights[i], base.bias)[0] for i in range(3)])

    with noise_level(model, levels):
        assert relative_error(model(x), by_hand(levels)) < 1e-14
    before, expected, merged = base.weight.clone(), by_hand(levels[:1]), weights_by_hand(model, levels[:1])[0]
    model.merge_adapter(noise_level=0.1)
    assert base.weight.dtype == torch.float64
    assert relative_error(base.weight, merged) < 1e-14
    assert relative_error(model(x), expected) < 1e-14
    model.unmerge_adapter()
    assert relative_error(base.weight, before) < 1e-14


def test_a_float64_embedding_merges_in_float64():
    model = adapted(OneLayer(nn.Embedding(13, 5).double()), target_modules=["layer"])
    layer = model.base_model.model.layer
    A, B = (factor["default"].detach() for factor in (layer.lora_embedding_A, layer.lora_embedding_B))
    expected = layer.weight + 6 / 4 * (B @ core_matrix(model, 0.4)[0].double() @ A).T
    ids = torch.randint(13, (3, 4))
    with noise_level(model, 0.4):
        assert relative_error(model(ids), expected[ids]) < 1e-14
    model.merge_adapter(noise_level=0.4)
    assert relative_error(layer.weight, expected) < 1e-14


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_gradients_of_a_float64_model_are_those_of_the_formula(use_dora):
    model = adapted(OneLayer(nn.Linear(7, 5).double()), target_modules=["layer"], use_dora=use_dora)
    layer: Any = model.base_model.model.layer
    x, levels = torch.randn(3, 4, 7, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9])
    core = core_matrix(model, levels).double()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    trainable = [A, B, *((layer.lora_magnitude_vector["default"].weight,) if use_dora else ())]
    rows = layer.get_base_layer().weight + 6 / 4 * torch.einsum("or,brs,si->boi", B, core, A)
    if use_dora:
        norm = rows.detach().square().sum(2, keepdim=True).sqrt()  # a constant, as in DoRA
        rows = trainable[2][:, None] * rows / norm
    expected = torch.einsum("boi,bli->blo", rows, x) + layer.get_base_layer().bias
    with noise_level(model, levels):
        actual = model(x)
    gradients = [torch.autograd.grad(y.square().sum(), trainable) for y in (actual, expected)]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-13


# ---------------------------------------------------------------- diffusers' layerwise casting


@pytest.mark.parametrize("casting_first", [False, True], ids=["adapter first", "casting first"])
def test_layerwise_casting_leaves_the_core_alone(casting_first):
    unet = tiny_unet()
    if casting_first:
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    unet.add_adapter(nara_config(target_modules=["to_q", "to_v"]))
    disturb(unet)
    exact = core_matrix(unet, LEVELS)
    if not casting_first:
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {t.dtype for n, t in unet.state_dict().items() if "nara_core" in n} == {torch.float32}
    assert torch.equal(core_matrix(unet, LEVELS), exact)


def test_under_layerwise_casting_the_update_is_as_exact_as_that_of_a_lora():
    outputs = {}
    for kind in ("exact", "LoRA", "NaRA"):
        torch.manual_seed(4)
        unet = tiny_unet()
        unet.add_adapter((nara_config if kind == "NaRA" else lora_config)(target_modules=["to_q", "to_v"]))
        generator = torch.Generator().manual_seed(2)
        for name, p in unet.named_parameters():
            if "lora_" in name:
                p.data.copy_(torch.randn(p.shape, generator=generator))
        if kind != "exact":
            unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        sample, context = torch.linspace(-1, 1, 192).view(1, 3, 8, 8), torch.linspace(-1, 1, 60).view(1, 5, 12)
        if kind == "NaRA":
            with noise_level(unet, 0.5), torch.no_grad():
                outputs[kind] = unet(sample, 7, context).sample
        else:
            with torch.no_grad():
                outputs[kind] = unet(sample, 7, context).sample
    # C = I, and both read the same float8 weights
    assert relative_error(outputs["NaRA"], outputs["LoRA"]) < 1e-5
