"""bitsandbytes layers of 8 and 4 bits: the formula on the dequantised weight, training, and merging at a λ.

On a CPU the packed 4-bit weight dequantises wrongly once it has run, so that W0 is read before, and the base output
comes from a stock twin.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.acceptance._by_hand import ALPHA, LEVELS, RANK, adapted, assert_near, core_by_hand, leaves, tensors_of

bnb = pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module to . ?-bit linear"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
]
CORES: dict[str, dict[str, Any]] = {
    "hypernetwork": {},
    "knots": {"core_type": "knots", "core_knots": 3},
    "bins": {"core_type": "bins", "core_bins": 2},
    "constant": {"core_type": "constant"},
}


class Quantized(nn.Module):
    """One layer (…, 128) → (…, 64), quantised and marked as Transformers marks a model."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        if bits == 4:
            self.layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32)
        else:
            self.layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8
        self.to("cpu")  # which quantises

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def dequantised(layer: Any) -> Tensor:
    """W0 (d_out, d_in) in float64 of a layer that has not run."""
    weight = layer.weight
    if type(weight).__name__ == "Int8Params":
        return weight.CB.double() * weight.SCB.double()[:, None] / 127
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()


def update_and_scale(model: PeftModel, W0: Tensor, tensors: dict[str, Tensor], levels: Tensor) -> tuple[Tensor, Any]:
    """s B C(λ) A (b, d_out, d_in), and m / ‖W0 + s B C A‖ (b, 1, d_out), or 1 without DoRA."""
    config = model.peft_config["default"]
    own = {n.removeprefix("nara_core.shared."): t for n, t in tensors.items() if "nara_core" in n}
    A, B, C = tensors["layer.lora_A.weight"], tensors["layer.lora_B.weight"], core_by_hand(config, own, levels)
    update = ALPHA / RANK * torch.einsum("or,brq,qk->bok", B, C, A)
    if not config.use_dora:
        return update, 1.0
    return update, (tensors["layer.lora_magnitude_vector"] / (W0 + update).detach().norm(dim=2))[:, None]


@pytest.mark.parametrize(
    ("bits", "use_dora", "core"),
    [(4, False, "hypernetwork"), (4, True, "bins"), (8, False, "constant"), (8, True, "knots")],
)
def test_quantised_layer_follows_the_formula_forward_and_backward(bits, use_dora, core):
    twin, base = Quantized(bits).eval(), Quantized(bits)
    W0, x = dequantised(base.layer), torch.randn(3, 5, 128)
    model = adapted(base, target_modules=["layer"], use_dora=use_dora, **CORES[core])
    assert type(model.base_model.model.layer.get_base_layer()) is type(twin.layer)
    tensors, bias = leaves(tensors_of(model)), twin.layer.bias.detach().double()
    update, scale = update_and_scale(model, W0, tensors, LEVELS)
    base_output = twin(x).detach().double() - bias  # 8-bit layers round their input too
    expected = scale * (base_output + torch.einsum("bok,blk->blo", update, x.double())) + bias
    weighting = torch.randn(expected.shape)
    with noise_level(model, LEVELS):
        model(x)
        output = model(x)
    (output * weighting).sum().backward()
    (expected * weighting).sum().backward()
    # of a weight that has run, bitsandbytes gives the norm in bfloat16
    bound = {"terms": 1, "sums": 1, "dtype": torch.bfloat16} if use_dora and bits == 4 else {"sums": 20}
    assert_near(output, expected, "output", **bound)
    gradients = tensors_of(model, gradients=True)
    assert gradients.keys() == {n for n, t in tensors.items() if t.grad is not None and "freq" not in n}
    for name, gradient in gradients.items():
        assert_near(gradient, tensors[name].grad, f"gradient of {name}", **bound)


@pytest.mark.parametrize("bits", [4, 8])
def test_merging_a_quantised_layer_quantises_the_weight_of_that_level(bits):
    base = Quantized(bits)
    W0 = dequantised(base.layer)
    model = adapted(base, target_modules=["layer"])
    update = update_and_scale(model, W0, leaves(tensors_of(model)), torch.tensor([0.35]))[0].detach()
    model.merge_adapter(noise_level=0.35)
    merged = dequantised(model.base_model.model.layer.get_base_layer())
    error = float((merged - (W0 + update[0])).abs().max() / (W0 + update[0]).abs().max())
    assert error < (0.2 if bits == 4 else 0.01)  # steps of 16 and of 255 values
    assert float(update.abs().max()) > float(W0.abs().max())
