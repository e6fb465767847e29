"""The forward rules against the formula in float64, and against PEFT's own layers where C = I."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from nara_diffusion import noise_level
from tests.adapted import (
    OneLayer,
    TwoLayers,
    adapted,
    core_by_hand,
    default_core,
    disturb,
    lora_config,
    nara_config,
    relative_error,
)

LEVELS = torch.tensor([0.05, 0.5, 0.93])
TIGHT = 2e-6  # float32 against float64: a few dozen additions, each rounded to 6e-8


def linear() -> nn.Module:
    return nn.Linear(7, 5)


def linear_without_bias() -> nn.Module:
    return nn.Linear(7, 5, bias=False)


def conv1d_of_transformers() -> nn.Module:
    layer = Conv1D(5, 7)  # (out, in), weight (7, 5)
    nn.init.normal_(layer.bias)
    return layer


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(7, 5, 3, stride=2, padding=1), (3, 7, 9)),
    "conv2d": (lambda: nn.Conv2d(7, 5, 3, padding=1), (3, 7, 6, 5)),
    "conv2d 1x1": (lambda: nn.Conv2d(7, 5, 1, bias=False), (3, 7, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(7, 5, (1, 2, 3), padding=(0, 1, 1)), (3, 7, 4, 3, 5)),
}
LINEARS = {"linear": linear, "no bias": linear_without_bias, "transformers Conv1D": conv1d_of_transformers}
TOKENS = {"2-D": (3, 7), "3-D": (3, 6, 7), "4-D": (3, 2, 6, 7)}


def base_weight(layer: nn.Module) -> Tensor:
    weight = layer.weight.double()
    return weight.T if isinstance(layer, Conv1D) else weight


def linear_by_hand(model: Any, x: Tensor, core: Tensor, dora: bool = False) -> Tensor:
    """y = W0 x + b + s B C A x for each sample, or with DoRA's norm, from materialised matrices."""
    layer = model.base_model.model.layer
    base = layer.get_base_layer()
    W0, s = base_weight(base), model.peft_config["default"].lora_alpha / layer.r["default"]
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    W = W0 + s * torch.einsum("or,brq,qi->boi", B, core, A)  # (b, d_out, d_in)
    if dora:
        W = layer.lora_magnitude_vector["default"].weight.double()[:, None] * W / W.norm(dim=2, keepdim=True)
    y = torch.einsum("b...i,boi->b...o", x.double(), W)
    return y if base.bias is None else y + base.bias.double()


def convolution_by_hand(model: Any, x: Tensor, core: Tensor, dora: bool = False) -> Tensor:
    layer = model.base_model.model.layer
    base = layer.get_base_layer()
    s = model.peft_config["default"].lora_alpha / layer.r["default"]
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    rows = []
    for sample, C in zip(x.double(), core, strict=True):
        W = base.weight.double() + s * torch.einsum("or,rq,q...->o...", B.flatten(1), C, A)
        if dora:
            norm = W.flatten(1).norm(dim=1)
            gain = layer.lora_magnitude_vector["default"].weight.double().flatten() / norm
            W = W * gain.view(-1, *(1,) * (W.dim() - 1))
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[W.dim()]
        bias = None if base.bias is None else base.bias.double()
        rows.append(convolve(sample[None], W, bias, base.stride, base.padding))
    return torch.cat(rows)


# ---------------------------------------------------------------- the formula, one C a sample


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("shape", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("make", LINEARS.values(), ids=LINEARS)
def test_linear_layers_follow_the_formula_per_sample(make, shape, use_dora):
    fan_in_fan_out = make is conv1d_of_transformers
    model = adapted(OneLayer(make()), target_modules=["layer"], use_dora=use_dora, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(shape)
    with noise_level(model, LEVELS):
        actual = model(x)
    core = default_core(model, LEVELS)
    assert (core - torch.eye(4)).abs().amax(dim=(1, 2)).min() > 0.1, "C is too near I to show an error"
    assert relative_error(actual, linear_by_hand(model, x, core, use_dora)) < TIGHT


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_follow_the_formula_per_sample(make, shape, use_dora):
    model = adapted(OneLayer(make()), target_modules=["layer"], use_dora=use_dora)
    x = torch.randn(shape)
    with noise_level(model, LEVELS):
        actual = model(x)
    assert relative_error(actual, convolution_by_hand(model, x, default_core(model, LEVELS), use_dora)) < TIGHT


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_follow_the_formula_per_sample(groups):
    model = adapted(OneLayer(nn.Conv2d(8, 12, 3, padding=1, groups=groups)), target_modules=["layer"])
    x = torch.randn(3, 8, 5, 6)
    with noise_level(model, LEVELS):
        actual = model(x)
    layer = model.base_model.model.layer
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double().flatten(1)
    full = torch.zeros(12, 4, dtype=torch.float64)  # B written out: group g of the rows reads group g of the columns
    rows, columns = 12 // groups, 4 // groups
    for g in range(groups):
        full[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = B[g * rows : (g + 1) * rows]
    W = torch.einsum("or,brq,qikl->boikl", full, default_core(model, LEVELS), A) * 6 / 4
    base = layer.get_base_layer()
    expected = F.conv2d(x.double(), base.weight.double(), base.bias.double(), padding=1, groups=groups)
    expected += torch.cat([F.conv2d(x[i : i + 1].double(), W[i], padding=1) for i in range(3)])
    assert relative_error(actual, expected) < TIGHT


def test_embeddings_follow_the_formula_per_sample():
    model = adapted(OneLayer(nn.Embedding(13, 5)), target_modules=["layer"])
    ids = torch.randint(13, (3, 6))
    with noise_level(model, LEVELS):
        actual = model(ids)
    layer = model.base_model.model.layer
    A, B = layer.lora_embedding_A["default"].double(), layer.lora_embedding_B["default"].double()  # (r, n), (d, r)
    update = torch.einsum("dr,brq,qn->bnd", B, default_core(model, LEVELS), A) * 6 / 4
    weight = layer.get_base_layer().weight.double() + update  # (b, n, d)
    assert relative_error(actual, torch.stack([weight[i][ids[i]] for i in range(3)])) < TIGHT


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_a_batch_equals_its_samples_one_by_one_and_a_shared_level_equals_a_repeated_one(use_dora):
    model = adapted(TwoLayers(), target_modules=["first", "second"], use_dora=use_dora)
    x = torch.randn(3, 6, 7)
    with noise_level(model, LEVELS):
        batch = model(x)
    for i in range(3):
        with noise_level(model, float(LEVELS[i])):
            torch.testing.assert_close(batch[i : i + 1], model(x[i : i + 1]), rtol=1e-5, atol=1e-6)
    with noise_level(model, 0.4):
        shared = model(x)
    with noise_level(model, torch.full((3,), 0.4)):
        torch.testing.assert_close(shared, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(7, 5), (7,)), (nn.Conv2d(7, 5, 3), (7, 6, 6)), (nn.Conv1d(7, 5, 3), (7, 6))]
)
def test_a_single_sample_without_batch_axis_is_served_or_refused_never_reshaped(layer, shape, use_dora):
    model = adapted(OneLayer(layer), target_modules=["layer"], use_dora=use_dora)
    x = torch.randn(shape)
    with noise_level(model, 0.3):
        expected = model(x[None])[0]
        actual = model(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_that_the_layer_sees_otherwise_is_refused_by_name():
    model = adapted(TwoLayers(), target_modules=["first"])
    with (
        noise_level(model, LEVELS),
        pytest.raises(ValueError, match=r"3 values, but the batch inside layer 'first' is 6"),
    ):
        model(torch.randn(6, 7))


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


# ---------------------------------------------------------------- C = I is PEFT's LoRA and DoRA


def identical_pair(make: Any, **options: Any) -> tuple[Any, Any]:
    """PEFT's adapter and NaRA's at C = I (a zero last layer, but a disturbed rest), with equal weights."""
    torch.manual_seed(3)
    base = make()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    theirs = get_peft_model(OneLayer(base), lora_config(target_modules=["layer"], **options))
    other = make()
    other.load_state_dict(state)
    ours = get_peft_model(OneLayer(other), nara_config(target_modules=["layer"], **options))
    disturb(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return theirs, ours


PARITY = {
    **{name: (make, (3, 6, 7)) for name, make in LINEARS.items()},
    **CONVOLUTIONS,
}


PARITY_CASES = [
    pytest.param(make, shape, use_dora, dropout, lora_bias, id=f"{name}-{use_dora=}-{dropout=}-{lora_bias=}")
    for name, (make, shape) in PARITY.items()
    for use_dora in (False, True)
    for dropout in (0.0, 0.4)
    for lora_bias in (False, True)
    if not lora_bias or not (use_dora or make().bias is None)  # PEFT has no such adapters
]


@pytest.mark.parametrize(("make", "shape", "use_dora", "dropout", "lora_bias"), PARITY_CASES)
def test_with_the_identity_core_outputs_and_gradients_are_those_of_peft(make, shape, use_dora, dropout, lora_bias):
    options = {"use_dora": use_dora, "lora_dropout": dropout, "lora_bias": lora_bias}
    options["fan_in_fan_out"] = make is conv1d_of_transformers
    theirs, ours = identical_pair(make, **options)
    x = torch.randn(shape)
    results = []
    for model in (theirs, ours):
        model.train()
        model.base_model.model.layer.get_base_layer().requires_grad_(True)
        inputs = x.clone().requires_grad_(True)
        torch.manual_seed(11)
        if model is ours:
            with noise_level(model, LEVELS):
                output = model(inputs)
        else:
            output = model(inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if "nara_core" not in n}
        assert all(gradient is not None for gradient in gradients.values()), gradients.keys()
        results.append((output, inputs.grad, gradients))
    (their_output, their_inputs, their_gradients), (our_output, our_inputs, our_gradients) = results
    assert their_gradients.keys() == our_gradients.keys()
    torch.testing.assert_close(our_output, their_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_inputs, their_inputs, rtol=1e-5, atol=1e-5)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_with_the_identity_core_an_embedding_is_that_of_peft():
    theirs, ours = identical_pair(lambda: nn.Embedding(13, 5))
    ids = torch.randint(13, (3, 6))
    with noise_level(ours, LEVELS):
        torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-5, atol=1e-6)


class ScaledEmbedding(nn.Embedding):
    """As Gemma 3 has it: what is looked up is multiplied by a constant."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def test_with_the_identity_core_a_scaled_and_padded_embedding_is_that_of_peft():
    theirs, ours = identical_pair(lambda: ScaledEmbedding(13, 5, padding_idx=2))
    ids = torch.randint(13, (3, 6))
    results = []
    for model in (theirs, ours):
        if model is ours:
            with noise_level(model, LEVELS):
                output = model(ids)
        else:
            output = model(ids)
        output.square().sum().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters() if "lora_" in n}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_with_the_identity_core_adapters_with_and_without_dora_combine_as_in_peft(dora, dropout):
    results, x = [], torch.randn(3, 4, 7)
    for config in (lora_config, nara_config):
        torch.manual_seed(3)
        model = get_peft_model(TwoLayers(), config(target_modules=["first"], use_dora=dora[0], lora_dropout=dropout))
        model.add_adapter("other", config(target_modules=["first"], r=2, use_dora=dora[1], lora_dropout=dropout))
        model.base_model.set_adapter(["default", "other"])
        core = {n: p.clone() for n, p in model.named_parameters() if "nara_core" in n}
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.copy_(torch.randn(p.shape, generator=generator).abs() * 0.5)
        torch.manual_seed(8)
        if core:
            with noise_level(model, LEVELS):
                output = model.train()(x)
        else:
            output = model.train()(x)
        output.square().sum().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters() if "lora_" in n}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_core_is_that_of_the_formula():
    model = adapted(OneLayer(linear()), target_modules=["layer"])
    x = torch.randn(3, 6, 7)
    weights = torch.randn(3, 6, 5)
    with noise_level(model, LEVELS):
        (model(x) * weights).sum().backward()
    names = [n for n, p in model.named_parameters() if "nara_core" in n]
    state = {n: t.double().requires_grad_(n in names) for n, t in model.state_dict().items()}
    prefix = "base_model.model.nara_core.cores.default.global."
    core = core_by_hand(state, prefix, model.peft_config["default"], LEVELS)
    (linear_by_hand(model, x, core) * weights).sum().backward()
    parameters = dict(model.named_parameters())
    for name in names:
        assert relative_error(parameters[name].grad, state[name].grad) < 1e-5, name


# ---------------------------------------------------------------- DoRA's norm from factors


class LargestTensor(TorchDispatchMode):
    """Records the shape of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() > math.prod(self.shape):
                self.shape = tuple(tensor.shape)
        return result


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_update_matrix_is_ever_made(training):
    d_in, d_out, batch = 96, 80, 4
    model = adapted(OneLayer(nn.Linear(d_in, d_out)), target_modules=["layer"], use_dora=True)
    x = torch.randn(batch, 3, d_in, requires_grad=True)
    with noise_level(model, torch.linspace(0.1, 0.9, batch)), LargestTensor() as largest:
        output = model.train(training)(x)
        if training:
            output.sum().backward()
    # views of W0 and its gradient have d_out × d_in numbers; nothing may have that for each sample
    assert math.prod(largest.shape) <= d_out * d_in, largest.shape


def test_the_norm_at_llada_width_is_exact_to_float32():
    from nara_diffusion.core import factored_row_norm

    W0, A, K = torch.randn(512, 768) * 0.02, torch.randn(32, 768) * 0.02, torch.randn(4, 512, 32)
    exact = (W0.double() + 0.5 * K.double() @ A.double()).norm(dim=2)
    assert relative_error(factored_row_norm(W0, A, K, 0.5), exact) < 1e-6


# ---------------------------------------------------------------- weights that are elsewhere


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("noise_embedding", ["fourier", "raw"])
@pytest.mark.parametrize(("make", "shape"), [(linear, (3, 6, 7)), CONVOLUTIONS["conv2d"]], ids=["linear", "conv2d"])
def test_offloaded_weights_are_brought_in_for_the_update_and_taken_away_again(make, shape, noise_embedding, use_dora):
    model = adapted(OneLayer(make()), target_modules=["layer"], use_dora=use_dora, noise_embedding=noise_embedding)
    x = torch.randn(shape)
    with noise_level(model, LEVELS), torch.no_grad():
        expected = model(x)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        for _ in range(2):
            assert torch.equal(model(x), expected)
            assert all(p.is_meta for p in model.parameters())
    model.merge_adapter(noise_level=0.5)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1], expected[1], rtol=1e-5, atol=1e-5)  # LEVELS[1] is 0.5


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(13, 5), r"NaRA-DoRA cannot adapt 'layer' \(Embedding\): the norm of a whole vocabulary"),
        (nn.Conv2d(8, 8, 3, groups=2), r"NaRA-DoRA cannot adapt 'layer' \(Conv2d with groups > 1\)"),
    ],
)
def test_layers_whose_norm_cannot_be_had_are_refused_by_name(layer, message):
    base = OneLayer(layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, nara_config(target_modules=["layer"], use_dora=True))
    assert base.layer is layer
