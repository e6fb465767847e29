"""Half precision: C stays float32 in convolutions and embeddings; DoRA's small magnitudes and gradients stay right.

C is made to show any rounding of it. Its rows, and its columns, sum to a thousandth of its entries; all rows of A are
alike, or all columns of B, so that the update depends on these sums only. In bfloat16 or float16 they would be lost.
tests/layers/test_half_precision.py has what linear layers promise.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nara_diffusion import NaraConfig, core_matrix, noise_level
from tests.acceptance._by_hand import CORES, LEVELS, SMALL, ByHand, Kinds, assert_near, leaves, tensors_of, write
from tests.acceptance._lives import FILE, frozen_sd, save_nara
from tests.helpers.adapted import adapted, exact_core

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]
dora = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])


def sensitive(kinds: list[str], dtype: torch.dtype, alike: str, use_dora: bool) -> tuple[PeftModel, ByHand]:
    """Layers with small base weights and a core of two knots whose sums are small; `alike` "A" or "B" reads them."""
    base = Kinds(kinds)
    for parameter in base.parameters():
        size = 4e-3 * (0.5 + torch.rand(parameter.shape))  # so that no row of W0 + s B C A is nearly zero
        parameter.data = torch.where(torch.rand(parameter.shape) < 0.5, size, -size)
    by_hand = ByHand(copy.deepcopy(base).to(dtype))
    options = {"r": 8, "lora_alpha": 12, "core_type": "knots", "core_knots": 2, "core_scale": 1.0}
    model = adapted(base, target_modules=kinds, use_dora=use_dora, **options)
    changed = {}
    for name, tensor in tensors_of(model).items():
        if "lora_A" in name or "embedding_A" in name:
            changed[name] = tensor[:1].expand_as(tensor) if alike == "A" else tensor
        elif "lora_B" in name or "embedding_B" in name:
            changed[name] = tensor[:, :1].expand_as(tensor) if alike == "B" else tensor
        elif "nara_core" in name:
            R = torch.randn(tensor.shape)
            R = R - R.mean(1, keepdim=True) - R.mean(2, keepdim=True) + R.mean((1, 2), keepdim=True)
            rows, columns = 1e-3 * torch.randn(2, 8, 1), 1e-3 * torch.randn(2, 1, 8)
            changed[name] = R + (rows + columns) / 8 - torch.eye(8)
    write(model, changed)
    for name, layer in by_hand.layers.items():
        base_layer = model.base_model.model.get_submodule(name).get_base_layer()
        base_layer.requires_grad_("trained" in name)
        layer.requires_grad_("trained" in name)
    return model.to(dtype), by_hand


def of_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {kind: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for kind, x in inputs.items()}


def backward(outputs: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Of one weighted sum of both."""
    for name, output in outputs.items():
        weighting = torch.rand(output.shape).to(dtype)
        (output * weighting).sum().backward(retain_graph=True)
        (expected[name] * weighting.double()).sum().backward(retain_graph=True)


half = pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])


@pytest.mark.parametrize("alike", ["A", "B"])
@half
@dora
def test_half_precision_layers_multiply_the_core_in_float32(use_dora, kind, alike):
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    kinds = [name for name in SMALL[use_dora] if "conv" in name or name in ("grouped", "embedding")]
    model, by_hand = sensitive(kinds, dtype, alike, use_dora)
    inputs = of_dtype(Kinds(kinds).inputs(), dtype)
    if kind == "autocast":
        model.float()  # with values that bfloat16 has
        inputs = of_dtype(inputs, torch.float32)
    tensors, xs = leaves(tensors_of(model)), leaves({kind: x for kind, x in inputs.items() if x.is_floating_point()})
    with noise_level(model, LEVELS), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        outputs = model(inputs)
    bound: dict[str, Any] = {"terms": 1, "sums": 8, "dtype": dtype}
    expected = by_hand.outputs(model.peft_config["default"], tensors, {**inputs, **xs}, LEVELS)
    backward(outputs, expected, dtype)
    if alike == "A":
        for name, output in outputs.items():
            assert_near(output, expected[name], name, **bound)
    gradients = tensors_of(model, gradients=True)
    assert {gradient.dtype for name, gradient in gradients.items() if "nara_core" in name} == {torch.float32}
    if alike == "B" and kind != "autocast":
        for name in [name for name in gradients if "_A" in name]:
            assert_near(gradients[name], tensors[name].grad, f"gradient of {name}", **bound)
        for of_kind, x in xs.items():
            assert_near(inputs[of_kind].grad, x.grad, f"gradient of the input of {of_kind}", **bound)


@dora
def test_float64_model_computes_in_float64_with_float32_core(use_dora):
    kinds = ["linear", "conv1d"]
    base = Kinds(kinds).double()
    inputs = of_dtype(base.inputs(), torch.float64)
    by_hand, model = ByHand(base), adapted(base, target_modules=kinds, use_dora=use_dora)
    core, tensors = exact_core(model, LEVELS), leaves(tensors_of(model))
    with noise_level(model, LEVELS):
        outputs = model(inputs)
    for name, expected in by_hand.outputs(model.peft_config["default"], tensors, inputs, LEVELS, core=core).items():
        assert_near(outputs[name], expected, name, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tiny_magnitudes_give_right_outputs_and_gradients(dtype):
    kinds = ["linear", "trained", "conv1d", "wide"]
    base = Kinds(kinds)
    by_hand = ByHand(copy.deepcopy(base).to(dtype))
    model = adapted(base, target_modules=kinds, use_dora=True)
    sizes = torch.tensor([1.0, 0.0, 1e-6])  # as drawn, zero, or tiny
    magnitudes = {name: tensor for name, tensor in tensors_of(model).items() if "magnitude" in name}
    write(model, {name: m * sizes[torch.arange(m.numel()) % 3].view_as(m) for name, m in magnitudes.items()})
    model.to(dtype)
    inputs = of_dtype(base.inputs(), dtype)
    tensors = leaves(tensors_of(model))
    with noise_level(model, 0.4):
        outputs = model(inputs)
    expected = by_hand.outputs(model.peft_config["default"], tensors, inputs, 0.4)
    for name, output in outputs.items():
        assert_near(output, expected[name], name, terms=2, sums=8, dtype=dtype)
    backward(outputs, expected, dtype)
    for name, gradient in tensors_of(model, gradients=True).items():
        if "magnitude" in name:
            assert_near(gradient, tensors[name].grad, f"gradient of {name}", terms=2, sums=8, dtype=dtype)


def test_dora_with_zero_row_is_base_at_start():
    linear = nn.Linear(5, 3)
    linear.weight.data[1] = 0
    x = torch.randn(2, 5)
    expected = linear(x)
    model = get_peft_model(nn.Sequential(linear), NaraConfig(r=2, target_modules=["0"], use_dora=True))
    with noise_level(model, 0.5):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("trained", "units", "bias"),
    [(False, 0.5, 0), (False, 0.5, 64), (True, 2.0, 0)],
    ids=["base frozen", "base frozen with a bias that is taken off again", "base trained"],
)
def test_magnitudes_gradient_in_bfloat16_is_summed_in_float32(trained, units, bias):
    """The sum is rounded once, or a part at a time where W0 is trained too.

    All products are integers that bfloat16 has, m / ‖W‖ is 1.25, and the sums need more than its 8 bits.
    """
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    A, B, W0 = integers(-1, 1, 2, 8), integers(-1, 1, 512, 2), integers(1, 5, 512, 8)
    x = 4 * (torch.eye(8)[torch.randint(8, (1, 300), generator=generator)])  # (1, 300, 8)
    W = W0 + B @ A
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 512, bias=bias > 0)),
        NaraConfig(r=2, lora_alpha=2, target_modules=["0"], use_dora=True),
    )
    base = model.base_model.model[0].get_base_layer().requires_grad_(trained)
    base.weight.data.copy_(W0)
    if bias:
        base.bias.data.fill_(bias)
    write(model, {"0.lora_A.weight": A, "0.lora_B.weight": B})
    model.to(torch.bfloat16)
    magnitude = next(p for name, p in model.named_parameters() if "magnitude" in name)
    magnitude.data = 1.25 * W.norm(dim=1)  # in float32, so that its gradient is rounded no further
    with noise_level(model, 0.5):
        output = model(x.bfloat16())
    assert torch.equal(output.float(), 1.25 * x @ W.T + bias)
    output.backward(torch.ones_like(output))
    exact = (x.double() @ W.double().T).sum((0, 1))
    unit = 2.0 ** (torch.floor(torch.log2(exact)) - 7)  # in the last place
    error = magnitude.grad.double() * W.double().norm(dim=1) - exact
    assert float((error / unit).abs().max()) < units + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("core", ["hypernetwork", "constant", "knots", "custom"])
def test_core_under_autocast_or_conversion_keeps_its_bits(core, dtype):
    model = adapted(Kinds(["linear"]), target_modules=["linear"], **CORES[core])
    expected = core_matrix(model, LEVELS)
    with torch.autocast("cpu", dtype):
        assert torch.equal(core_matrix(model, LEVELS), expected)
    original = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    model.to(dtype)
    assert torch.equal(core_matrix(model, LEVELS), expected)
    for name, tensor in tensors_of(model).items():
        is_core = "nara_core" in name
        assert tensor.dtype == (torch.float32 if is_core else dtype), name
        assert not is_core or torch.equal(tensor, original[name]), name


def states(pipe: Any) -> dict[str, Tensor]:
    parts = (pipe.unet, pipe.text_encoder)
    return {name: tensor.clone() for model in parts for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("component", "factor", "value"), [("unet", "B", -7e4), ("text_encoder", "A", 65520.0)])
def test_factor_overflowing_float16_loads_only_in_bfloat16(tmp_path, component, factor, value):
    """Before anything has changed; the largest number of float16 loads."""
    save_nara(tmp_path, text=True, target_modules=["to_q", "conv1"])
    metadata, tensors = safe_open(tmp_path / FILE, "pt").metadata(), load_file(tmp_path / FILE)
    key = max(key for key in tensors if key.startswith(component) and f"lora_{factor}" in key)
    for name, number in (("largest", 65504.0), ("larger", value)):
        tensors[key].view(-1)[3] = number
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / FILE, metadata=metadata)
    module, pipe = key.removeprefix(f"{component}.").partition(".lora_")[0], frozen_sd().to(torch.float16)
    for options in ({}, {"hotswap": True}):
        original = states(pipe)
        with pytest.raises(ValueError, match=rf"{module}\.lora_{factor}\.(toy\.)?weight.* too large for .* bfloat16"):
            pipe.load_nara_weights(tmp_path / "larger", adapter_name="toy", **options)
        state_after = states(pipe)
        assert state_after.keys() == original.keys()
        assert all(torch.equal(state_after[name], original[name]) for name in original)
        pipe.load_nara_weights(tmp_path / "largest", adapter_name="toy", **options)
    assert max(tensor.max() for name, tensor in states(pipe).items() if "lora_" in name) == 65504
    other = frozen_sd().to(torch.bfloat16)
    other.load_nara_weights(tmp_path / "larger")
    assert all(tensor.isfinite().all() for tensor in states(other).values())
