"""`to_lora(model, noise_level="best")`: nearest over a density of λ, against dense updates and numerical minima."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion import StrengthSchedule, noise_level, to_lora
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, default_core, relative_error
from tests.helpers.exported import loaded, update_of
from tests.helpers.rounding import rounding_of

TARGETS = ["first", "second"]
GRID = (torch.arange(128, dtype=torch.float32) + 0.5) / 128
RISING = StrengthSchedule([(0, 0.0), (1, 2.0)])
DENSITIES: dict[str, Any] = {"uniform": None, "rising": RISING, "one side": lambda level: (level > 0.5).float()}


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


def weights(density: Any, levels: Tensor = GRID) -> Tensor:
    found = torch.ones(len(levels)) if density is None else density(levels)
    return found.double() / found.double().sum()


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"second": 2}}, {"core_type": "bins", "core_bins": 2},
                                     {"core_type": "knots", "core_knots": 3}], ids=str)  # fmt: skip
def test_it_is_the_mean_of_the_updates_and_its_error_that_of_dense_matrices(tmp_path, density, options):
    model = adapted(base(), target_modules=TARGETS, **options)
    lora = to_lora(model, "best", density=density)
    w, total, wrong = weights(density), 0.0, 0.0
    for name in TARGETS:
        updates, own = dense_updates(model, name, GRID), dense_of(lora, name)
        assert relative_error(own, torch.einsum("n,noi->oi", w, updates)) < 1e-6
        total, wrong = total + updates.square().sum((1, 2)), wrong + (updates - own).square().sum((1, 2))
    expected = wrong.sqrt() / (w * total).sum().sqrt()
    assert lora.error is not None
    torch.testing.assert_close(torch.tensor(lora.error.update).double(), expected, rtol=1e-4, atol=1e-6)
    assert lora.error.mean_update == pytest.approx(float((w * expected.square()).sum().sqrt()), rel=1e-4)
    assert lora.error.worst_update == pytest.approx(float(expected.max()), rel=1e-4)
    loaded(lora, tmp_path, base())


def test_no_other_core_is_nearer():
    model = adapted(base(), target_modules=["first"])
    lora = to_lora(model, "best", density=RISING)
    layer, updates = model.base_model.model.first, dense_updates(model, "first", GRID)
    A, B = (getattr(layer, f"lora_{factor}")["default"].weight.double() for factor in "AB")
    moment = torch.einsum("n,noi->oi", weights(RISING), updates)
    X = torch.linalg.lstsq(torch.kron(1.5 * B, A.T.contiguous()), moment.flatten()[:, None]).solution.view(4, 4)
    assert relative_error(dense_of(lora, "first"), 1.5 * B @ X @ A) < 1e-5


LAYERS: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(7, 5), torch.randn(6, 4, 7)),
    "convolution": (lambda: nn.Conv2d(7, 5, 3, stride=2), torch.randn(6, 7, 6, 5)),
    "embedding": (lambda: nn.Embedding(13, 5), torch.randint(9, (6, 4))),
}


@pytest.mark.parametrize(("make", "x"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("density", [None, RISING], ids=["uniform", "rising"])
def test_on_a_batch_the_outputs_of_the_layer_are_nearest(make, x, density):
    """Of one layer, whose input is the same at each λ, no small change of the core comes nearer."""
    model = adapted(OneLayer(make()), target_modules=["layer"])
    levels = (torch.arange(16, dtype=torch.float32) + 0.5) / 16
    w = weights(density, levels)

    def outputs(level: float) -> Tensor:
        scale = 1.0 if x.dtype == torch.long else 1 + level
        return model(x if x.dtype == torch.long else x * scale)

    lora = to_lora(model, "best", density=density, batch=outputs)
    variant = model.base_model.model.layer.lora_variant["default"]
    B = model.base_model.model.layer
    B_ = (
        (B.lora_embedding_B["default"] if x.dtype == torch.long else B.lora_B["default"].weight)
        .detach()
        .double()
        .flatten(1)
    )
    X = torch.linalg.lstsq(B_, lora.layers["layer"].B.double().flatten(1)).solution  # B' = B X

    def loss(core: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for weight, level in zip(w, levels, strict=True):
            with noise_level(model, float(level)), torch.no_grad():
                y = outputs(float(level)).double()
            variant.read_core = lambda rank: core[None].float()
            try:
                with noise_level(model, float(level)):
                    total = total + weight * (outputs(float(level)).double() - y).square().sum()
            finally:
                del variant.read_core
        return total

    core = X.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(core), core)
    at_mean = default_core(model, levels).mul(w[:, None, None]).sum(0).clone().requires_grad_(True)
    (other,) = torch.autograd.grad(loss(at_mean), at_mean)
    assert gradient.norm() < 1e-3 * max(other.norm(), loss(core).detach())
    assert lora.error is not None
    assert len(lora.error.output) == len(lora.error.output_levels) == 16


def test_output_errors_are_those_of_the_loaded_lora(tmp_path):
    model = adapted(base(), target_modules=TARGETS)
    x = torch.randn(5, 7)
    before = copy.deepcopy(model.state_dict())
    lora = to_lora(model, "best", batch={"x": x})
    plain = loaded(lora, tmp_path, base())
    assert lora.error is not None
    with torch.no_grad():
        y, wrong, sizes = plain(x), [], []
        with model.disable_adapter():
            y0 = model(x)
        for level in lora.error.output_levels:
            with noise_level(model, level):
                wrong.append(float((model(x) - y).norm()))
                sizes.append(float((model(x) - y0).norm()))
    unit = torch.tensor(sizes).square().mean().sqrt()
    torch.testing.assert_close(torch.tensor(lora.error.output), torch.tensor(wrong) / unit, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not model.training


def test_the_error_lies_beside_the_files(tmp_path):
    model = adapted(base(), target_modules=TARGETS)
    lora = to_lora(model, "best", batch=(torch.randn(5, 7),))
    lora.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "export_error.json").read_text())
    assert lora.error is not None
    assert content["update"] == lora.error.update
    assert content["worst_output"] == lora.error.worst_output
    assert (tmp_path / "export_error.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("core_type", ["constant", "identity"])
def test_an_adapter_that_is_the_same_at_each_level_has_no_error(core_type):
    model = adapted(base(), target_modules=TARGETS, core_type=core_type)
    lora = to_lora(model, "best")
    assert lora.error is not None
    assert lora.error.worst_update < 1e-12
    expected = to_lora(model)
    assert relative_error(dense_of(lora, "first"), dense_of(expected, "first")) < 1e-6


def test_what_is_no_density_or_batch_is_refused():
    model = adapted(base(), target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"noise_level is 'worst': pass a number in \[0, 1\], or \"best\""):
        to_lora(model, "worst")
    with pytest.raises(ValueError, match=r"density gave values from -1 to -1"):
        to_lora(model, "best", density=lambda level: -torch.ones(len(level)))
    with pytest.raises(ValueError, match="density gave values from 0 to 0"):
        to_lora(model, "best", density=lambda level: torch.zeros(len(level)))
    for nothing in (lambda level: [], lambda level: None, lambda level: 1.0):
        with pytest.raises(ValueError, match=r"density gave .*, expected one value for each of the 128 λ"):
            to_lora(model, "best", density=nothing)
    with pytest.raises(ValueError, match="density is a float: pass a function"):
        to_lora(model, "best", density=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='density and batch are for noise_level="best"'):
        to_lora(model, 0.5, batch=torch.randn(2, 7))
    with pytest.raises(ValueError, match="on batch, the model returned a NoneType"):
        to_lora(model, "best", batch=lambda level: None)
    with pytest.raises(ValueError, match="batch is a list: pass"):
        to_lora(model, "best", batch=[torch.randn(2, 7)])  # type: ignore[arg-type]
    model.merge_adapter(noise_level=0.3)
    with pytest.raises(ValueError, match="is merged, disabled or not active"):
        to_lora(model, "best", batch=torch.randn(2, 7))


@pytest.mark.parametrize("density", [torch.tensor([0.3]), torch.tensor(0.3), [0.3]])
def test_a_mask_density_may_be_a_tensor_or_a_list(density):
    model = adapted(base(), target_modules=TARGETS, core_input="both")
    expected = to_lora(model, "best", mask_density=0.3).state_dict()
    found = to_lora(model, "best", mask_density=density).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_rounding_is_all_that_outputs_differ_by_where_c_is_constant():
    model = adapted(base(), target_modules=TARGETS, core_type="knots", core_knots=2)
    core = model.base_model.model.nara_core.cores["default"]["shared"]
    core.deviation.data[1] = core.deviation.data[0]
    lora = to_lora(model, "best", batch=torch.randn(5, 7))
    assert lora.error is not None
    assert lora.error.worst_output is not None
    assert lora.error.worst_output < 10 * rounding_of(model)
