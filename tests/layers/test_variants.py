"""The LoRA variants against the formula in float64, one C a sample, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch import nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, core_by_hand, default_core, relative_error
from tests.helpers.layers.formulas import (
    CONVOLUTIONS,
    LEVELS,
    LINEARS,
    TIGHT,
    conv1d_of_transformers,
    convolution_by_hand,
    linear,
    linear_by_hand,
)

TOKENS = {"2-D": (3, 7), "3-D": (3, 6, 7), "4-D": (3, 2, 6, 7)}


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


def test_the_gradient_of_the_core_is_that_of_the_formula():
    model = adapted(OneLayer(linear()), target_modules=["layer"])
    x = torch.randn(3, 6, 7)
    weights = torch.randn(3, 6, 5)
    with noise_level(model, LEVELS):
        (model(x) * weights).sum().backward()
    names = [n for n, p in model.named_parameters() if "nara_core" in n]
    state = {n: t.double().requires_grad_(n in names) for n, t in model.state_dict().items()}
    prefix = "base_model.model.nara_core.cores.default.shared."
    core = core_by_hand(state, prefix, model.peft_config["default"], LEVELS)
    (linear_by_hand(model, x, core) * weights).sum().backward()
    parameters = dict(model.named_parameters())
    for name in names:
        assert relative_error(parameters[name].grad, state[name].grad) < 1e-5, name


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
