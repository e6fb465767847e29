"""What goes into the hypernetwork and what is done to its C: scale of λ, embeddings of layers, normalisation."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, core_matrix, noise_level
from nara_diffusion.cores.embeddings import rescaled
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, core_by_hand, default_core, nara_config, relative_error
from tests.helpers.rounding import rounding_of

LEVELS = torch.tensor([0.0, 0.003, 0.31, 0.77, 0.999, 1.0])
DENSITY = torch.tensor([0.9, 0.2, 0.0, 0.6, 1.0, 0.4])
PREFIX = "base_model.model.nara_core.cores.default.shared."


# ---------------------------------------------------------------- the scale of λ


@pytest.mark.parametrize("core_input", ["noise_level", "mask_density", "both"])
@pytest.mark.parametrize("noise_embedding", ["fourier", "mlp", "raw"])
def test_log_snr_follows_its_formula_and_leaves_the_density_alone(noise_embedding, core_input):
    model = adapted(
        OneLayer(nn.Linear(7, 5)),
        target_modules=["layer"],
        noise_scale="log_snr",
        noise_embedding=noise_embedding,
        core_input=core_input,
    )
    density = None if core_input == "noise_level" else DENSITY
    actual = core_matrix(model, LEVELS, mask_density=density)
    expected = core_by_hand(model.state_dict(), PREFIX, model.peft_config["default"], LEVELS, DENSITY)
    frequencies = [buffer.abs().max() for name, buffer in model.named_buffers() if "frequencies" in name]
    error = torch.finfo(torch.float32).eps * max(
        frequencies, default=torch.zeros(())
    )  # of sin(w · u), since u is rounded
    assert relative_error(actual, expected) < rounding_of(model) + error


def test_log_snr_grows_with_the_noise_over_the_unit_interval():
    u = rescaled(torch.linspace(0, 1, 1001), "log_snr")
    assert u[0].item() == pytest.approx(0, abs=1e-6)
    assert u[-1].item() == pytest.approx(1, abs=1e-6)
    assert u[500].item() == pytest.approx(0.5, abs=1e-6)
    assert bool((u.diff()[8:-8] > 0).all())
    assert u[100].item() == pytest.approx(0.5 - math.log(9) / 10, abs=1e-6)


def test_log_snr_tells_ends_apart_that_a_linear_scale_does_not():
    near = torch.tensor([0.02, 0.04])
    spread = [float(rescaled(near, scale).diff().abs()) for scale in ("linear", "log_snr")]
    assert spread[1] > 3 * spread[0]


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize("core_type", ["hypernetwork", "constant"])
def test_a_normalised_core_has_the_norm_of_i_and_the_direction_of_c(core_type):
    model = adapted(
        OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type=core_type, core_normalization="frobenius"
    )
    actual = core_matrix(model, LEVELS)
    expected = default_core(model, LEVELS)
    assert relative_error(actual.expand_as(expected), expected) < 5e-6
    torch.testing.assert_close(actual.square().sum((1, 2)), torch.full((len(actual),), 4.0))


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 7, 8, 11, 32, 64])
@pytest.mark.parametrize("core_type", ["hypernetwork", "constant"])
def test_a_normalised_core_is_exactly_i_at_step_0(core_type, rank):
    config = nara_config(target_modules=["layer"], r=rank, core_type=core_type, core_normalization="frobenius")
    core = core_matrix(get_peft_model(OneLayer(nn.Linear(7, 5)), config), LEVELS)
    assert torch.equal(core, torch.eye(rank).expand_as(core))


# ---------------------------------------------------------------- centred


CENTRED = {
    "hypernetwork": {},
    "layer vectors": {"core_sharing": "layer_embedding"},
    "two knots": {"core_type": "knots", "core_knots": 2},
    "five knots": {"core_type": "knots", "core_knots": 5},
}


@pytest.mark.parametrize("options", CENTRED.values(), ids=CENTRED)
def test_the_mean_of_a_centred_core_is_i_and_c_isnt(options):
    config = {"target_modules": ["layer"], "core_normalization": "centred", **options}
    model = adapted(OneLayer(nn.Linear(7, 5)), **config)
    core = core_matrix(model, (torch.arange(64 * 20) + 0.5) / (64 * 20), module="layer")
    eye = torch.eye(4)
    assert relative_error(core.mean(0), eye) < (1e-5 if "core_type" in options else 2e-2)  # F's grid has 64 points
    assert (core - eye).abs().max() > 0.05
    fresh = get_peft_model(OneLayer(nn.Linear(7, 5)), nara_config(**config))
    assert torch.equal(core_matrix(fresh, LEVELS, module="layer"), eye.expand(len(LEVELS), 4, 4))


# ---------------------------------------------------------------- a vector for each layer


def test_each_layer_reads_the_core_of_its_own_vector():
    model = adapted(
        TwoLayers(), target_modules=["first", "second"], core_sharing="layer_embedding", rank_pattern={"second": 3}
    )
    names = [name for name in model.state_dict() if "layer_embeddings" in name]
    assert names == [PREFIX + "layer_embeddings.first", PREFIX + "layer_embeddings.second"]
    expected = torch.randn(6, 3, 7)
    x = expected.clone()
    expected = expected.double()
    for name in ("first", "second"):
        layer = model.base_model.model.get_submodule(name)
        core = default_core(model, LEVELS, group=name)
        assert relative_error(core_matrix(model, LEVELS, module=name), core) < 2e-6
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        core = core[:, : len(A), : len(A)]
        W = layer.get_base_layer().weight.double() + 6 / len(A) * torch.einsum("or,brq,qi->boi", B, core, A)
        expected = torch.einsum("bli,boi->blo", expected, W) + layer.get_base_layer().bias.double()
        expected = torch.tanh(expected) if name == "first" else expected
    first, second = (core_matrix(model, 0.3, module=name) for name in ("first", "second"))
    assert (first - second).abs().max() > 0.05, "the vectors make no difference"
    with noise_level(model, LEVELS):
        assert relative_error(model(x), expected) < 5e-6


def test_vectors_of_layers_cost_their_width_and_one_slice_of_the_first_layer():
    sizes = {}
    for sharing in ("global", "layer_embedding"):
        model = get_peft_model(
            TwoLayers(), nara_config(target_modules=["first", "second"], core_sharing=sharing, layer_embedding_dim=5)
        )
        sizes[sharing] = sum(p.numel() for name, p in model.named_parameters() if "nara_core" in name)
    assert sizes["layer_embedding"] - sizes["global"] == 2 * 5 + 5 * 9


def test_vectors_differ_at_first_and_each_receives_its_own_gradient():
    config = nara_config(target_modules=["first", "second"], core_sharing="layer_embedding", core_init="kaiming")
    model = get_peft_model(TwoLayers(), config)
    vectors = {name: p for name, p in model.named_parameters() if "layer_embeddings" in name}
    first, second = vectors.values()
    assert not torch.equal(first, second)
    model.base_model.model.first.lora_B["default"].weight.data.normal_()
    with noise_level(model, 0.3):
        model(torch.randn(2, 7)).square().sum().backward()
    assert first.grad.abs().max() > 0  # B of the second layer is zero still
    assert torch.equal(second.grad, torch.zeros_like(second))


def test_at_step_0_every_layers_core_is_exactly_i():
    config = nara_config(target_modules=["first", "second"], core_sharing="layer_embedding")
    model = get_peft_model(TwoLayers(), config)
    for name in ("first", "second"):
        assert torch.equal(core_matrix(model, LEVELS, module=name), torch.eye(4).expand(6, 4, 4))


def test_merging_takes_each_layers_own_core():
    model = adapted(TwoLayers(), target_modules=["first", "second"], core_sharing="layer_embedding")
    x = torch.randn(3, 7)
    with noise_level(model, 0.3):
        expected = model(x)
    model.merge_adapter(noise_level=0.3)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    with noise_level(model, 0.3):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_named_like_a_method_of_a_dictionary_has_its_own_vector():
    base = nn.Module()
    base.values, base.names = nn.Linear(7, 5), nn.Linear(7, 5)
    base.forward = lambda x: base.values(x) + base.names(x)
    model = adapted(base, target_modules=["values", "names"], core_sharing="layer_embedding")
    with noise_level(model, 0.4):
        assert model(torch.randn(2, 7)).shape == (2, 5)
    assert not torch.equal(core_matrix(model, 0.4, module="values"), core_matrix(model, 0.4, module="names"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise_scale": "log"}, "noise_scale is 'log': choose one of 'linear', 'log_snr'"),
        ({"core_normalization": None}, "core_normalization is None: choose one of 'none', 'frobenius', 'centred'"),
        (
            {"core_type": "constant", "core_normalization": "centred"},
            "'centred', which is for core_type 'hypernetwork' and 'knots'; C of core_type 'constant'",
        ),
        ({"core_input": "both", "core_normalization": "centred"}, "but core_input is 'both'"),
        ({"layer_embedding_dim": 0}, "layer_embedding_dim is 0: pass a positive integer"),
        (
            {"core_type": "constant", "core_sharing": "layer_embedding"},
            "core_sharing is 'layer_embedding', but core_type 'constant' has no network .*core_sharing='layer'",
        ),
        (
            {"core_type": "bins", "r": 10, "core_normalization": "frobenius"},
            "C of core_type 'bins' is taken as it is",
        ),
    ],
)
def test_what_no_core_would_read_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NaraConfig(**fields)
