"""An adapter's cores on a grid of λ, and the error of K fixed cores with strengths over λ in place of them.

    ΔW(λ) ≈ Σ_k φ_k(λ) s B C_k A,        C_k = Σ_i T_ki C(λ_i)

The error follows from the inner products M_ij = ⟨ΔW(λ_i), ΔW(λ_j)⟩ alone: with Φ_ik = φ_k(λ_i) and E = 1 − Φ T, the
squared error at λ_i is (E M Eᵀ)_ii. M is computed from r × r matrices, so the dense ΔW (d_out, d_in) is never made:

    ⟨s B C A, s B C' A⟩ = Σ (Bᵀ B C s² A Aᵀ) ⊙ C'

The grid has 257 equal steps, and all points between which the cores are linear in λ, or constant:

    knots               the knots, k / (K − 1)
    bins, rank_mask     both sides of each step of a mask: neighbouring float32 numbers, since λ is float32
    a strength          its points, and both sides of its steps
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import is_tied_to_rank
from nara_diffusion.noise.signals import Level, NoiseSignals, as_signal

from .adapted_layers import AdaptedLayer, Adapter
from .errors import ExportError

GRID = 257
_SCAN = 4097

CoreKey = tuple[str, str] | None
"""The key of a core; layers that read no core have the key None."""


class CoreSamples:
    """C at λ (n,), in ascending order: GRID equal steps, and the breakpoints.

    Attributes:
        levels: (n,) float32. breakpoints: the indices of the breakpoints in it.
        cores: {key: C (n or 1, r, r), float64}. weights: (n,), by the trapezoidal rule; they sum to 1.
        products: M (n, n).
    """

    def __init__(self, adapter: Adapter, mask_density: Level | None) -> None:
        points = _breakpoints(adapter)
        self.levels = torch.cat([torch.linspace(0, 1, GRID, dtype=torch.float32), points]).unique()
        self.breakpoints: list[int] = torch.searchsorted(self.levels, points).tolist()
        density = None if mask_density is None else as_signal(mask_density, "mask_density").expand_as(self.levels)
        self.cores = _cores_at(adapter, NoiseSignals(self.levels, density))
        half = self.levels.double().diff() / 2
        zero = half.new_zeros(1)
        self.weights = torch.cat([half, zero]) + torch.cat([zero, half])
        self.products = _products(adapter, self.cores, len(self.levels))

    def same(self, one: int, other: int) -> bool:
        """Whether all cores are equal at two points of the grid."""
        return all(len(core) == 1 or torch.equal(core[one], core[other]) for core in self.cores.values())

    def mixed(self, mixing: Tensor) -> dict[CoreKey, Tensor]:
        """C_k of T (K, n): {key: (K or 1, r, r)}."""
        return {
            key: core if len(core) == 1 else torch.einsum("kn,nrs->krs", mixing, core)
            for key, core in self.cores.items()
        }

    def error(self, shares: Tensor, mixing: Tensor) -> ExportError:
        """The error over λ of Φ (n, K) and T (K, n)."""
        E = torch.eye(len(self.levels), dtype=torch.float64) - shares @ mixing
        errors = ((E @ self.products) * E).sum(1).clamp(min=0).sqrt()
        unit = (self.weights * self.products.diagonal().clamp(min=0)).sum().sqrt()
        relative = errors / unit if unit else torch.zeros_like(errors)
        return ExportError(self.levels.tolist(), self.weights.tolist(), relative.tolist())


def core_in(cores: Mapping[CoreKey, Tensor], layer: AdaptedLayer, index: int) -> Tensor:
    """The core of a layer (r, r), the `index`-th of `mixed`."""
    found = cores[layer.key]
    return found[index if len(found) > 1 else 0][: layer.rank, : layer.rank]


def _cores_at(adapter: Adapter, signals: NoiseSignals) -> dict[CoreKey, Tensor]:
    found: dict[CoreKey, Tensor] = {}
    for layer in adapter.layers:
        if layer.key is None:
            size = max(layer.rank, found[None].shape[-1] if None in found else 0)
            found[None] = torch.eye(size, dtype=torch.float64)[None]
        elif layer.key not in found:
            assert adapter.holder is not None
            found[layer.key] = adapter.holder.core_to_export(layer.key, signals).double().cpu()
    return found


def _products(adapter: Adapter, cores: dict[CoreKey, Tensor], n: int) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ (n, n) over all layers, float64."""
    total = torch.zeros(n, n, dtype=torch.float64)
    for layer in adapter.layers:
        A, B = layer.A.double().flatten(1), layer.B.double().flatten(1)
        if layer.groups > 1:
            B = torch.block_diag(*B.chunk(layer.groups))
        C = cores[layer.key][:, : layer.rank, : layer.rank].expand(n, -1, -1)
        total += (B.T @ B @ C @ (layer.scaling**2 * A @ A.T)).flatten(1) @ C.flatten(1).T
    return total


# ---------------------------------------------------------------------- breakpoints


def _breakpoints(adapter: Adapter) -> Tensor:
    """The breakpoints of the adapter in ascending order, 0 and 1 included: (p,) float32."""
    config: Any = adapter.config
    found = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    scaled = {} if adapter.holder is None else adapter.holder.strengths.get(adapter.name, {})
    for schedule in {each.schedule for each in scaled.values() if each.schedule is not None}:
        levels = torch.tensor([level for level, _ in schedule.points], dtype=torch.float32)
        steps = levels[1:][levels.diff() == 0]
        found += [levels, steps.nextafter(torch.zeros_like(steps))]
    if isinstance(config, NaraConfig) and config.core_type == "knots":
        found.append(torch.arange(config.core_knots, dtype=torch.float32) / (config.core_knots - 1))
    if isinstance(config, NaraConfig) and is_tied_to_rank(config):
        found.append(_steps_of_masks(adapter))
    return torch.cat(found).unique()


def _steps_of_masks(adapter: Adapter) -> Tensor:
    """Both sides of each λ at which a mask changes, by bisection."""
    assert adapter.holder is not None
    cores: Any = adapter.holder.cores[adapter.name]

    def differ(one: Tensor, other: Tensor) -> Tensor:
        pairs = zip(cores.at(NoiseSignals(one)).values(), cores.at(NoiseSignals(other)).values(), strict=True)
        return torch.stack([(mine != theirs).flatten(1).any(1) for mine, theirs in pairs]).any(0).cpu()

    scan = torch.linspace(0, 1, _SCAN, dtype=torch.float32)
    changes = differ(scan[:-1], scan[1:])
    low, high = scan[:-1][changes], scan[1:][changes]
    while bool(((middle := (low + high) / 2) != low).logical_and(middle != high).any()):
        above = differ(low, middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.cat([low, high])
