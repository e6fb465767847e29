"""NaRA on bitsandbytes layers, where that library is installed; 4-bit and 8-bit layers run on a CPU too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import adapted, default_core, disturb, lora_config, nara_config, relative_error

bnb = pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module to . ?-bit linear"),
    pytest.mark.filterwarnings("ignore:Unmerge lora module to . ?-bit linear"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
]
LEVELS = torch.tensor([0.05, 0.5, 0.93])


class Quantized(nn.Module):
    """One 4- or 8-bit layer (…, 64) → (…, 32), marked as Transformers marks a quantised model."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        if bits == 4:
            self.layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
        else:
            self.layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def quantized(bits: int) -> Quantized:
    torch.manual_seed(3)
    return Quantized(bits).to("cpu")  # moving quantises


@pytest.mark.parametrize(("bits", "use_dora"), [(4, False), (4, True), (8, False), (8, True)])
@pytest.mark.parametrize("training", [False, True])
def test_the_update_follows_the_formula_on_the_dequantised_weight(bits, use_dora, training):
    model = adapted(quantized(bits), target_modules=["layer"], use_dora=use_dora).train(training)
    layer = model.base_model.model.layer
    assert type(layer).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    x = torch.randn(3, 5, 64)
    base_layer = layer.get_base_layer()
    if bits == 8:
        W0 = base_layer.weight.CB.double() * base_layer.weight.SCB.double()[:, None] / 127
    else:
        W0 = dequantize_module_weight(base_layer).detach().double()
    base, bias = base_layer(x).detach().double(), base_layer.bias.detach().double()
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    update = 6 / 4 * torch.einsum("or,brq,qi->boi", B, default_core(model, LEVELS), A)
    expected = base + torch.einsum("bli,boi->blo", x.double(), update)
    if use_dora:
        dora_scale = layer.lora_magnitude_vector["default"].weight.double() / (W0 + update).norm(dim=2)
        expected = (expected - bias) * dora_scale[:, None] + bias
    with noise_level(model, LEVELS):
        for _ in range(2):
            # 8-bit layers multiply in half precision; the weight of the norm is rounded to bfloat16 by bitsandbytes
            assert relative_error(model(x), expected) < (2e-3 if bits == 8 else 1e-3 if use_dora else 2e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_with_the_identity_core_outputs_and_gradients_are_those_of_peft(use_dora, dropout):
    options = {"target_modules": ["layer"], "use_dora": use_dora, "lora_dropout": dropout}
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    x = torch.randn(3, 5, 64)
    for config in (lora_config(**options), nara_config(**options)):
        model: Any = get_peft_model(quantized(4), config).train()
        core = {n: p.clone() for n, p in model.named_parameters() if "nara_core" in n}
        disturb(model)
        for name, tensor in core.items():
            model.get_parameter(name).data.copy_(tensor)
        torch.manual_seed(5)
        if core:
            with noise_level(model, LEVELS):
                output = model(x)
        else:
            output = model(x)
        output.square().sum().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters() if "lora_" in n}))
    (theirs, their_gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_merging_quantises_the_weight_of_one_level(bits):
    model = adapted(quantized(bits), target_modules=["layer"])
    layer = model.base_model.model.layer
    W0 = dequantize_module_weight(layer.get_base_layer()).detach().double()
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    expected = W0 + 6 / 4 * B @ default_core(model, LEVELS[1:2])[0] @ A
    with pytest.raises(ValueError, match="one λ"):
        model.merge_adapter()
    model.merge_adapter(noise_level=0.5)
    merged = dequantize_module_weight(layer.get_base_layer()).double()
    assert relative_error(merged, expected.detach()) < (0.2 if bits == 4 else 0.01)  # the grid of 16 or 255 values
    with noise_level(model, 0.6), pytest.raises(ValueError, match="merged at noise_level"):
        model(torch.randn(2, 64))


def test_a_weight_that_inference_has_reordered_is_not_merged():
    model = adapted(quantized(4), target_modules=["layer"])
    x = torch.randn(2, 64)
    with noise_level(model, 0.5), torch.no_grad():
        expected = model(x)
    with pytest.raises(ValueError, match="4-bit weight of layer 'layer' cannot be merged"):
        model.merge_adapter(noise_level=0.5)
    with noise_level(model, 0.5), torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_of_b_is_not_merged_into_a_quantised_layer(bits):
    model = adapted(quantized(bits), target_modules=["layer"], lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=True on the quantised layer 'layer'"):
        model.merge_adapter(noise_level=0.5)


def test_checkpoints_of_a_quantised_model_load_the_same_bits(tmp_path):
    model = adapted(quantized(4), target_modules=["layer"])
    model.save_pretrained(tmp_path)
    base = quantized(4)
    torch.manual_seed(99)
    other = PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(3, 5, 64)
    with noise_level(model, LEVELS), noise_level(other, LEVELS):
        assert torch.equal(other(x), model(x))


def test_a_mixed_batch_on_a_quantised_layer():
    model = adapted(quantized(4), target_modules=["layer"])
    model.add_adapter("other", nara_config(target_modules=["layer"], r=2))
    disturb(model, seed=4)
    x = torch.randn(3, 5, 64)
    names = ["other", "__base__", "default"]
    with noise_level(model, LEVELS):
        mixed = model(x, adapter_names=names)
    for i in (0, 2):
        model.set_adapter(names[i])
        with noise_level(model, float(LEVELS[i])):
            torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1]), rtol=1e-4, atol=1e-4)
