"""Sizes of updates over λ in factored form: ‖s B D A‖² = Σ (Bᵀ B D) ⊙ (D s² A Aᵀ), with matrices (r, r) alone.

D is a core C(λ), or the difference of two; ⟨s B D A, s B D' A⟩ likewise. The dense product (d_out, d_in) is never made.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nara_diffusion.noise.signals import Level, NoiseSignals, as_signal

from .adapted_layers import AdaptedLayer, Adapter

CoreKey = tuple[str, str] | None
Cores = Mapping[CoreKey, Tensor]
"""{key of a core: C (n or 1, r, r), float64}; layers that read no core have the key None."""


def cores_over(adapter: Adapter, noise_levels: Tensor, mask_density: Level | None = None) -> dict[CoreKey, Tensor]:
    """The cores that the adapter's layers read, at λ (n,): {key: (n or 1, r, r), float64}.

    Args:
        mask_density: one value in [0, 1], the same at each λ.

    Raises:
        ValueError: a core reads the mask density, and it is not given.
    """
    density = None if mask_density is None else as_signal(mask_density, "mask_density").expand_as(noise_levels)
    signals = NoiseSignals(noise_levels, density)
    found: dict[CoreKey, Tensor] = {}
    for layer in adapter.layers:
        if layer.key is None:
            size = max(layer.rank, len(found[None][0]) if None in found else 0)
            found[None] = torch.eye(size, dtype=torch.float64)[None]
        elif layer.key not in found:
            assert adapter.holder is not None
            found[layer.key] = adapter.holder.core_to_export(layer.key, signals).double().cpu()
    return found


def mean_over(cores: Cores, weights: Tensor) -> dict[CoreKey, Tensor]:
    """Σ w C for weights (n,) that sum to 1: (1, r, r)."""
    return {
        key: core if len(core) == 1 else torch.einsum("n,nrs->rs", weights.double(), core)[None]
        for key, core in cores.items()
    }


class UpdateNorm:
    """‖ΔW‖_F over all layers of an adapter, as a function of its cores."""

    def __init__(self, adapter: Adapter) -> None:
        self.grams = [(layer.key, layer.rank, *_grams(layer)) for layer in adapter.layers]

    def __call__(self, cores: Cores) -> Tensor:
        """‖ΔW‖_F (n,) with those cores in place of C(λ), float64."""
        n = max(len(core) for core in cores.values())
        total = torch.zeros(n, dtype=torch.float64)
        for key, rank, of_b, of_a in self.grams:
            core = cores[key][:, :rank, :rank]
            total = total + ((of_b @ core) * (core @ of_a)).sum((1, 2))
        return total.clamp(min=0).sqrt()

    def products(self, cores: Cores) -> Tensor:
        """⟨ΔW_i, ΔW_j⟩ (n, n) over all layers, float64; on the diagonal are ‖ΔW_i‖²."""
        n = max(len(core) for core in cores.values())
        total = torch.zeros(n, n, dtype=torch.float64)
        for key, rank, of_b, of_a in self.grams:
            core = cores[key][:, :rank, :rank].expand(n, rank, rank)
            total += (of_b @ core @ of_a).flatten(1) @ core.flatten(1).T
        return total


def _grams(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """Bᵀ B and s² A Aᵀ, both (r, r), float64."""
    A, B = layer.A.double().flatten(1), layer.B.double().flatten(1)
    if layer.groups > 1:
        B = torch.block_diag(*B.chunk(layer.groups))
    return B.T @ B, layer.scaling**2 * A @ A.T
