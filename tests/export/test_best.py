"""`to_lora(model, noise_level="best")`: the update that is nearest over λ, against dense matrices."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import to_lora
from tests.helpers.adapted import TwoLayers, adapted, default_core, relative_error
from tests.helpers.exported import loaded, update_of

TARGETS = ["first", "second"]


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


def dense_updates(model: Any, name: str, levels: Tensor) -> Tensor:
    """ΔW (n, d_out, d_in) by hand."""
    layer = getattr(model.base_model.model, name)
    return torch.stack([update_of(layer, core=core) for core in default_core(model, levels)])


def dense_of(lora: Any, name: str) -> Tensor:
    layer = lora.layers[name]
    return layer.scaling * layer.B.double().flatten(1) @ layer.A.double().flatten(1)


def grid(lora: Any) -> tuple[Tensor, Tensor]:
    """λ (n,) of the error, and the weights of the trapezoidal rule (n,), float64."""
    levels = torch.tensor(lora.error.noise_levels)
    ends = torch.cat([levels[:1], levels, levels[-1:]]).double()
    return levels, (ends[2:] - ends[:-2]) / 2


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"second": 2}}, {"core_type": "bins", "core_bins": 2},
                                     {"core_type": "knots", "core_knots": 3}], ids=str)  # fmt: skip
def test_it_is_the_mean_of_the_updates_and_its_error_that_of_dense_matrices(tmp_path, options):
    model = adapted(base(), target_modules=TARGETS, **options)
    lora = to_lora(model, "best")
    (levels, w), total, wrong = grid(lora), 0.0, 0.0
    torch.testing.assert_close(torch.tensor(lora.error.weights).double(), w)
    for name in TARGETS:
        updates, own = dense_updates(model, name, levels), dense_of(lora, name)
        assert relative_error(own, torch.einsum("n,noi->oi", w, updates)) < 1e-6
        total, wrong = total + updates.square().sum((1, 2)), wrong + (updates - own).square().sum((1, 2))
    expected = wrong.sqrt() / (w * total).sum().sqrt()
    torch.testing.assert_close(torch.tensor(lora.error.update).double(), expected, rtol=1e-4, atol=1e-6)
    assert lora.error.mean_update == pytest.approx(float((w * expected.square()).sum().sqrt()), rel=1e-4)
    assert lora.error.worst_update == pytest.approx(float(expected.max()), rel=1e-4)
    loaded(lora, tmp_path, base())


def test_no_other_core_is_nearer():
    model = adapted(base(), target_modules=["first"])
    lora = to_lora(model, "best")
    layer, (levels, w) = model.base_model.model.first, grid(lora)
    A, B = (getattr(layer, f"lora_{factor}")["default"].weight.double() for factor in "AB")
    moment = torch.einsum("n,noi->oi", w, dense_updates(model, "first", levels))
    X = torch.linalg.lstsq(torch.kron(1.5 * B, A.T.contiguous()), moment.flatten()[:, None]).solution.view(4, 4)
    assert relative_error(dense_of(lora, "first"), 1.5 * B @ X @ A) < 1e-5


def test_a_word_that_is_not_best_is_refused():
    model = adapted(base(), target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"noise_level is 'worst': pass a number in \[0, 1\], or \"best\""):
        to_lora(model, "worst")


def test_the_error_lies_beside_the_files(tmp_path):
    model = adapted(base(), target_modules=TARGETS)
    lora = to_lora(model, "best")
    lora.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "export_error.json").read_text())
    assert lora.error is not None
    assert content["update"] == lora.error.update
    assert content["worst_update"] == lora.error.worst_update
    assert (tmp_path / "export_error.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("core_type", ["constant", "identity"])
def test_an_adapter_that_is_the_same_at_each_level_has_no_error(core_type):
    model = adapted(base(), target_modules=TARGETS, core_type=core_type)
    lora = to_lora(model, "best")
    assert lora.error is not None
    assert lora.error.worst_update < 1e-12
    expected = to_lora(model)
    assert relative_error(dense_of(lora, "first"), dense_of(expected, "first")) < 1e-6


@pytest.mark.parametrize("density", [torch.tensor([0.3]), torch.tensor(0.3), [0.3]])
def test_a_mask_density_may_be_a_tensor_or_a_list(density):
    model = adapted(base(), target_modules=TARGETS, core_input="both")
    expected = to_lora(model, "best", mask_density=0.3).state_dict()
    found = to_lora(model, "best", mask_density=density).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
