"""`to_lora_bins` of cores that no sum of LoRAs is: nearest by least squares over λ, against dense float64 matrices."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import StrengthSchedule, set_strength, to_lora, to_lora_bins
from nara_diffusion.export import LoraBins
from nara_diffusion.export.bins import core_samples
from nara_diffusion.export.hosts.comfyui_workflow import keyframes, level_of
from tests.helpers.adapted import TwoLayers, adapted, default_core, relative_error
from tests.helpers.exported import update_of

TARGETS = ["first", "second"]
LATE = StrengthSchedule([(0.2, 0.0), (0.9, 1.0)])


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


@pytest.mark.parametrize("density", [None, LATE], ids=["uniform", "late"])
@pytest.mark.parametrize("interpolation", ["linear", "constant"])
@pytest.mark.parametrize("options", [{}, {"core_sharing": "layer"}, {"rank_pattern": {"second": 2}}], ids=str)
def test_loras_are_the_least_squares_solution_in_dense_matrices(options, interpolation, density):
    own = model(**options)
    bins = to_lora_bins(own, 5, density=density, interpolation=interpolation)
    assert len(bins.loras) == 5
    levels, fine = torch.tensor(bins.error.noise_levels), torch.linspace(0, 1, 4001)
    assert len(levels) == 257
    for points, tolerance in ((levels, 2e-5), (fine, 2e-2)):
        widths = torch.ones(len(points), dtype=torch.float64)
        widths[[0, -1]] = 0.5
        weights = (widths * (1 if density is None else density(points).double())).sqrt()[:, None]
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
    for interpolation in ("linear", "constant"):
        bins = to_lora_bins(own, 1, density=LATE, interpolation=interpolation)
        expected = to_lora(own, "best", density=LATE).state_dict()
        assert bins.schedules[0](torch.linspace(0, 1, 11)).eq(1).all()
        assert all(relative_error(t, expected[key]) < 1e-3 for key, t in bins.loras[0].state_dict().items())


def test_a_density_brings_the_loras_near_where_it_is():
    own, levels = model(), torch.linspace(0.75, 1, 101)
    late, alike = (to_lora_bins(own, 3, density=density) for density in (StrengthSchedule([(0.7, 0), (0.8, 1)]), None))
    assert error_by_hand(late, own, levels).mean() < 0.7 * error_by_hand(alike, own, levels).mean()
    torch.testing.assert_close(sum(late.error.weights), 1.0)
    assert all(
        weight == 0 for weight, level in zip(late.error.weights, late.error.noise_levels, strict=True) if level < 0.7
    )


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


@pytest.mark.parametrize("by", ["mean", "worst"])
def test_parts_are_the_best_of_all_on_a_coarse_grid(monkeypatch, by):
    monkeypatch.setattr(core_samples, "GRID", 11)
    own, levels, number = model(), torch.linspace(0, 1, 11), 4
    dense = torch.cat([update.flatten(1) for update in updates(own, levels).values()], dim=1)
    weights = torch.full((11,), 0.1, dtype=torch.float64)
    weights[[0, -1]] = 0.05

    def cost(edges: tuple[int, ...]) -> float:
        squares = torch.zeros(11, dtype=torch.float64)
        for first, after in zip((0, *edges), (*edges, 11), strict=True):
            w, part = weights[first:after, None], dense[first:after]
            squares[first:after] = (part - (w * part).sum(0) / w.sum()).square().sum(1)
        unit = float((weights * dense.square().sum(1)).sum())
        return float(squares.max() / unit) ** 0.5 if by == "worst" else float((weights * squares).sum() / unit) ** 0.5

    best = {
        count: min(cost(edges) for edges in combinations(range(1, 11), count - 1)) for count in (number - 1, number)
    }
    if by == "mean":
        bins = to_lora_bins(own, number, interpolation="constant")
        assert bins.error.mean_update == pytest.approx(best[number], rel=1e-5)
    else:
        bins = to_lora_bins(own, bound=0.999 * best[number - 1], interpolation="constant")
        assert bins.error.worst_update == pytest.approx(best[number], rel=1e-5)
    assert len(bins.loras) == number


def test_of_parts_one_lora_plays_at_a_time():
    bins = to_lora_bins(model(), 6, interpolation="constant")
    phi = shares(bins, torch.rand(2000))
    assert set(phi.unique().tolist()) == {0.0, 1.0}
    assert phi.sum(1).eq(1).all()
    assert [int(row.argmax()) for row in shares(bins, torch.tensor(bins.noise_levels))] == list(range(6))
    assert shares(bins, torch.tensor([0.0, 1.0])).argmax(1).tolist() == [0, 5]


@pytest.mark.parametrize(
    "options", [{"core_type": "bins", "core_bins": 3, "r": 6}, {"core_type": "rank_mask"}], ids=str
)
def test_masks_are_exact_with_one_lora_at_a_time_too(options):
    own = model(**options)
    bins = to_lora_bins(own, interpolation="constant")
    assert len(bins.loras) == len(to_lora_bins(own).loras)
    assert bins.error.worst_update < 1e-6
    levels = torch.tensor([0.0, 1 / 3, 0.3333, 0.5, 2 / 3, 0.99, 1.0])
    for level in levels:
        exact, phi = to_lora(own, float(level)), shares(bins, level[None])[0]
        for name in TARGETS:
            layer = exact.layers[name]
            found = torch.einsum("k,kij->ij", phi, parts(bins, name))
            assert relative_error(found, layer.scaling * layer.B.double() @ layer.A.double()) < 1e-6


def test_what_is_exact_between_knots_is_not_with_one_lora_at_a_time():
    own = model(core_type="knots", core_knots=3)
    with pytest.raises(ValueError, match="is not exactly a sum of 64 LoRAs: pass bins, their number"):
        to_lora_bins(own, interpolation="constant")
    with pytest.raises(ValueError, match="interpolation is 'cubic': pass 'linear' or 'constant'"):
        to_lora_bins(own, 3, interpolation="cubic")


@pytest.mark.parametrize("shift", [None, 3.0])
def test_hosts_that_hold_switch_where_the_parts_end(shift):
    bins = to_lora_bins(model(), 5, interpolation="constant")
    levels = [level_of(percent / 1000 + 3e-4, shift) for percent in range(1000)]
    wanted = shares(bins, torch.tensor(levels).clamp(max=1)).argmax(1).tolist()
    frames = [keyframes(schedule, shift) for schedule in bins.schedules]
    for percent, part in enumerate(wanted):
        at = percent / 1000 + 3e-4
        held = [next(value for start, value in reversed(each) if start <= at) for each in frames]
        assert held == [float(index == part) for index in range(5)], at
