"""`to_lora_bins` of cores that no sum of LoRAs is: nearest by least squares over λ, against dense float64 matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import StrengthSchedule, set_strength, to_lora, to_lora_bins
from nara_diffusion.export import LoraBins
from tests.helpers.adapted import TwoLayers, adapted, default_core, relative_error
from tests.helpers.exported import update_of

TARGETS = ["first", "second"]


def model(**options: Any) -> Any:
    torch.manual_seed(3)
    return adapted(TwoLayers(), **{"target_modules": TARGETS, "fourier_scale": 3.0, **options})


def updates(adapted_model: Any, levels: Tensor) -> dict[str, Tensor]:
    """ΔW(λ) (n, d_out, d_in) of each layer, float64."""
    found = {}
    for name in TARGETS:
        group = name if adapted_model.peft_config["default"].core_sharing == "layer" else "shared"
        layer = getattr(adapted_model.base_model.model, name)
        found[name] = torch.stack([update_of(layer, core=C) for C in default_core(adapted_model, levels, group=group)])
    return found


def parts(bins: LoraBins, name: str) -> Tensor:
    """ΔW_k (K, d_out, d_in), float64."""
    layers = [lora.layers[name] for lora in bins.loras]
    return torch.stack([layer.scaling * layer.B.double() @ layer.A.double() for layer in layers])


def shares(bins: LoraBins, levels: Tensor) -> Tensor:
    return torch.stack([schedule(levels) for schedule in bins.schedules], dim=1).double()  # (n, K)


def error_by_hand(bins: LoraBins, adapted_model: Any, levels: Tensor) -> Tensor:
    """‖ΔW_exported − ΔW‖ over all layers (n,)."""
    phi = shares(bins, levels)
    squares = [
        (torch.einsum("nk,kij->nij", phi, parts(bins, name)) - own).square().sum((1, 2))
        for name, own in updates(adapted_model, levels).items()
    ]
    return sum(squares).sqrt()


@pytest.mark.parametrize("options", [{}, {"core_sharing": "layer"}, {"rank_pattern": {"second": 2}}], ids=str)
def test_loras_are_the_least_squares_solution_in_dense_matrices(options):
    own = model(**options)
    bins = to_lora_bins(own, 5)
    assert len(bins.loras) == 5
    levels, fine = torch.tensor(bins.error.noise_levels), torch.linspace(0, 1, 4001)
    assert len(levels) == 257
    for points, tolerance in ((levels, 2e-5), (fine, 2e-2)):
        widths = torch.ones(len(points), dtype=torch.float64)
        widths[[0, -1]] = 0.5
        weights = widths.sqrt()[:, None]
        for name, dense in updates(own, points).items():
            nearest = torch.linalg.lstsq(weights * shares(bins, points), weights * dense.flatten(1)).solution
            assert relative_error(parts(bins, name), nearest.view(5, *dense.shape[1:])) < tolerance


def test_the_fit_is_nearer_than_samples_and_than_the_best_single_lora():
    own, levels = model(), torch.linspace(0, 1, 2001)
    single = to_lora(own, "best").error
    assert single is not None
    before = single.mean_update
    for number in (2, 4, 8):
        bins = to_lora_bins(own, number)
        sampled = LoraBins([to_lora(own, level) for level in bins.noise_levels], bins.schedules, [], bins.error)
        ours, theirs = (error_by_hand(each, own, levels).square().mean().sqrt() for each in (bins, sampled))
        assert ours < 0.85 * theirs
        assert bins.error.mean_update < before
        before = bins.error.mean_update


def test_one_lora_is_the_best_single_one():
    own = model()
    bins = to_lora_bins(own, 1)
    expected = to_lora(own, "best").state_dict()
    assert bins.schedules[0](torch.linspace(0, 1, 11)).eq(1).all()
    assert all(relative_error(t, expected[key]) < 1e-6 for key, t in bins.loras[0].state_dict().items())


def test_a_strength_with_steps_is_fitted_on_both_sides_of_them():
    own, levels = model(), torch.linspace(0, 1, 1001)
    set_strength(own, "default", StrengthSchedule([(0.6, 1.5), (0.6, 0.0)]))
    bins = to_lora_bins(own, 7)
    exported = torch.einsum("nk,kij->nij", shares(bins, levels), parts(bins, "first"))
    wanted = updates(own, levels)["first"] * torch.where(levels < 0.6, 1.5, 0.0).double()[:, None, None]
    error = (exported - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1).max()
    assert error[levels >= 0.6].max() < 1e-3
    assert error.max() < 0.15


def test_the_error_of_a_core_of_fast_sinusoids_is_that_between_the_points_of_a_grid_too():
    own = model(fourier_scale=300.0, noise_embedding_dim=64)
    bins = to_lora_bins(own, 8)
    levels = torch.rand(3000)
    wrong = error_by_hand(bins, own, levels).square().mean().sqrt()
    size = sum(dense.square().sum((1, 2)).mean() for dense in updates(own, levels).values()).sqrt()
    assert float(wrong / size) == pytest.approx(bins.error.mean_update, rel=0.05)
