"""The core stays in float32, whatever casts the model: PyTorch, autocast, or Diffusers layer by layer."""

from __future__ import annotations

import pytest
import torch

from nara_diffusion import core_matrix, noise_level
from tests.adapted import TwoLayers, adapted, disturb, lora_config, nara_config, relative_error
from tests.tiny_unet import tiny_unet

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
