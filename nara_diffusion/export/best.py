"""The one LoRA that is nearest to a NaRA over all noise levels, for hosts without schedules.

    in updates    min over X of Σ w(λ) ‖s B (C(λ) − X) A‖²           X = Σ w(λ) C(λ)
    in outputs    min over X of Σ w(λ) ‖s B (C(λ) − X) A x_λ‖²       X = (Σ w C S)(Σ w S)⁻¹,  S(λ) = Σ A x_λ (A x_λ)ᵀ

x_λ are the inputs of a layer on a batch at λ, and the weights w sum to 1. By outputs, each layer has its own X, which
is the mean of C in directions that no input has. In DoRA, the update inside the norm is approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.noise.signals import Level

from .adapted_layers import AdaptedLayer, Adapter
from .errors import ExportError, relative
from .outputs import OUTPUT_LEVELS, Batch, Outputs
from .update_norm import Cores, UpdateNorm, cores_over, mean_over

Density = Callable[[Tensor], Any]
"""A function: λ (n,) → how often each one occurs (n,), 0 or more, in any unit. A StrengthSchedule is one."""

GRID = 128


def midpoints(count: int) -> Tensor:
    """The middles of `count` equal parts of [0, 1]: (count,) float32."""
    return (torch.arange(count, dtype=torch.float32) + 0.5) / count


def weights_of(density: Density | None, levels: Tensor) -> Tensor:
    """w (n,) at λ (n,), float64, whose sum is 1.

    Raises:
        ValueError: `density` is no function, or gives values that are negative, not finite, zero everywhere, or not
            one for each λ.
    """
    if density is None:
        return torch.full((len(levels),), 1 / len(levels), dtype=torch.float64)
    if not callable(density):
        raise ValueError(
            f"density is a {type(density).__name__}: pass a function of λ (n,) that gives how often each λ occurs (n,)."
        )
    given = density(levels)
    found = torch.as_tensor(torch.nan if given is None else given, dtype=torch.float64)
    if found.shape != levels.shape:
        shown = f"shape {tuple(found.shape)}" if found.dim() else repr(given)
        raise ValueError(f"density gave {shown}, expected one value for each of the {len(levels)} λ.")
    if not bool((found >= 0).all()) or not 0 < float(found.sum()) < float("inf"):
        raise ValueError(
            f"density gave values from {float(found.min()):g} to {float(found.max()):g}, expected finite values of 0 "
            "or more, not all 0."
        )
    return found / found.sum()


def best_cores(
    model: nn.Module, adapter: Adapter, density: Density | None, batch: Batch | None, mask_density: Level | None
) -> tuple[Callable[[AdaptedLayer], Tensor], ExportError]:
    """X (r, r) of each layer, float64, and their error over λ."""
    levels = midpoints(GRID)
    cores, weights = cores_over(adapter, levels, mask_density), weights_of(density, levels)
    mean = mean_over(cores, weights)
    if batch is None:
        found = {layer.name: mean[layer.key][0, : layer.rank, : layer.rank] for layer in adapter.layers}
        outputs = None
    else:
        outputs = Outputs(model, adapter, batch, mask_density)
        found = _least_squares(adapter, outputs, mean, density, mask_density)
    own = {layer.name: found[layer.name][None] for layer in adapter.layers}
    error = _error(adapter, levels, weights, cores, own, outputs)
    return lambda layer: found[layer.name], error


def _least_squares(
    adapter: Adapter, outputs: Outputs, mean: Cores, density: Density | None, mask_density: Level | None
) -> dict[str, Tensor]:
    levels = midpoints(OUTPUT_LEVELS)
    weights = weights_of(density, levels)[:, None, None]
    cores, grams = cores_over(adapter, levels, mask_density), outputs.input_grams(levels)
    found = {}
    for layer in adapter.layers:
        rank, S = layer.rank, grams[layer.name]
        around = mean[layer.key][0, :rank, :rank]
        deviation = cores[layer.key][:, :rank, :rank] - around
        total = (weights * S).sum(0)
        found[layer.name] = around + (weights * (deviation @ S)).sum(0) @ torch.linalg.pinv(total, hermitian=True)
    return found


def _error(
    adapter: Adapter, levels: Tensor, weights: Tensor, cores: Cores, own: dict[str, Tensor], outputs: Outputs | None
) -> ExportError:
    norms, squares = [], []
    for layer in adapter.layers:
        norm, key = UpdateNorm(Adapter(adapter.root, adapter.name, adapter.config, [layer])), layer.key
        core = cores[key][:, : layer.rank, : layer.rank]
        norms.append(norm({key: core}).square().expand(len(levels)))
        squares.append(norm({key: core - own[layer.name]}).square().expand(len(levels)))
    sizes, errors = (torch.stack(found).sum(0).sqrt().tolist() for found in (norms, squares))
    of_outputs = [] if outputs is None else outputs.errors(midpoints(OUTPUT_LEVELS), lambda _: own)
    return ExportError(
        noise_levels=levels.tolist(),
        weights=weights.tolist(),
        update=relative(errors, sizes, weights.tolist()),
        output_levels=midpoints(OUTPUT_LEVELS).tolist() if of_outputs else [],
        output=of_outputs,
    )
