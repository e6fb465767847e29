"""`core_matrix`: the C(λ) of every type of core is that of its formula by hand, and starts as I."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, core_matrix, noise_level
from tests.acceptance._by_hand import CORES, LEVELS, RANK, Kinds, assert_near, core_by_hand, group_of, tensors_of
from tests.helpers.adapted import adapted, nara_config

MODULE = "two.bare"
VALUES: dict[str, dict[str, Any]] = {
    "fourier": {},
    "mlp": {"noise_embedding": "mlp", "core_hidden_dims": (9,)},
    "raw": {"noise_embedding": "raw", "core_hidden_dims": (9, 10, 11)},
    "identity": CORES["identity"],
    "constant": CORES["constant"],
    "knots": CORES["knots"],
    "custom": CORES["custom"],
}


def own_tensors(model: nn.Module, module: str = "one.linear") -> dict[str, torch.Tensor]:
    """The tensors, in float64, of the core that a module reads, by their names below that core."""
    prefix = f"nara_core.{group_of(model.peft_config['default'], module)}."
    return {
        name.removeprefix(prefix): tensor.double()
        for name, tensor in tensors_of(model).items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("options", VALUES.values(), ids=VALUES)
def test_core_values_of_disturbed_cores_match_the_formula(options):
    model = adapted(Kinds(["linear", "bare"]), target_modules=["linear", "bare"], core_sharing="layer", **options)
    levels = torch.tensor([0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.9, 1.0])  # of four knots: on each, and between
    actual = core_matrix(model, levels, module=MODULE)
    expected = core_by_hand(model.peft_config["default"], own_tensors(model, MODULE), levels)
    assert len(actual) == (1 if options.get("core_type") in ("constant", "identity") else len(levels))
    assert_near(actual, expected[: len(actual)], terms=10)
    assert (actual[1:] - actual[:-1]).abs().amax(dim=(1, 2)).gt(1e-3).all(), "too alike to show an error"


def test_fourier_frequencies_have_configured_deviation_and_stay_fixed():
    model = adapted(Kinds(["linear"]), target_modules=["linear"], noise_embedding_dim=4096, fourier_scale=16.0)
    frequencies = own_tensors(model)["embeddings.noise_level.frequencies"]
    assert frequencies.shape == (2048,)
    assert float(frequencies.std()) == pytest.approx(16.0, rel=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    with noise_level(model, 0.3):
        sum(y.sum() for y in model({"linear": torch.randn(3, 6)}).values()).backward()
    optimizer.step()
    assert torch.equal(own_tensors(model)["embeddings.noise_level.frequencies"], frequencies)


def started(**options: Any) -> nn.Module:
    return get_peft_model(Kinds(["linear"]), nara_config(target_modules=["linear"], **options))


def test_learned_cores_start_as_identity_unless_kaiming():
    for options in ({}, {"core_init": "zero_all"}, *(CORES[name] for name in ("constant", "identity", "knots"))):
        actual = core_matrix(started(**options), LEVELS)
        assert torch.equal(actual, torch.eye(RANK).expand_as(actual)), options
    for core in ("hypernetwork", "constant"):
        deviation = core_matrix(started(core_init="kaiming", **CORES[core]), LEVELS) - torch.eye(RANK)
        assert deviation.abs().amax(dim=(1, 2)).min() > 0.01, core


@pytest.mark.parametrize("init", ["zero_last", "zero_all"])
def test_hypernetwork_starts_with_the_layers_of_its_initialisation(init):
    tensors = own_tensors(started(core_init=init))
    assert not any(tensors[f"layers.{i}.bias"].any() for i in range(3))
    assert not tensors["layers.2.weight"].any()
    for weight in (tensors["layers.0.weight"], tensors["layers.1.weight"]):
        bound = weight.shape[1] ** -0.5 if init == "zero_last" else 0.0  # Kaiming-uniform with a = √5
        assert 0.8 * bound <= float(weight.abs().max()) <= bound


def test_default_hypernetwork_at_rank_32_has_papers_size():
    model = get_peft_model(Kinds(["linear"]), NaraConfig(r=32, target_modules=["linear"]))
    trainable, _ = model.get_nb_trainable_parameters()
    factors = sum(32 * (6 + width) for width in (5, 7))
    assert trainable - factors == 673_536
