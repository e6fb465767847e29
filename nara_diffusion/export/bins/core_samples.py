"""An adapter's cores on a grid of λ, and K fixed cores that approximate them by least squares.

    min over C_1 … C_K of ∫ w(λ) ‖s B D(λ) A‖² dλ,      D(λ) = Σ_k φ_k(λ) C_k − C(λ)

    C_k = Σ_l (G⁻¹)_kl ∫ w φ_l C dλ,                    G_kl = ∫ w φ_k φ_l dλ      (K, K)

These are the nearest for any B and A: the derivative by C_k is 2 s² BᵀB (∫ w φ_k D dλ) A Aᵀ, which is zero in all
layers at once where ∫ w φ_k D dλ = 0, and the integral is convex in C. G is the same for every entry of every core, so
one system of K equations is solved for all.

On the grid C_k = Σ_i T_ki C(λ_i), and errors follow from the inner products M_ij = ⟨ΔW(λ_i), ΔW(λ_j)⟩ alone: with
E = 1 − Φ T, the squared error at λ_i is (E M Eᵀ)_ii. So placements of φ are compared without B and A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nara_diffusion.noise.signals import Level
from nara_diffusion.noise.strength import StrengthSchedule

from ..adapted_layers import Adapter
from ..best import Density, weights_of
from ..errors import ExportError, relative
from ..update_norm import CoreKey, UpdateNorm, cores_over
from .breakpoints import as_levels

GRID = 257
_FLOOR = 1e-9
"""The least weight w, so that C_k is defined where the density is zero."""


@dataclass(frozen=True)
class Blend:
    """K cores and their strengths over λ.

    Attributes:
        noise_levels: λ_k (K,), at which φ_k is 1. schedules: φ_k. mixing: T (K, n), so that C_k = Σ_i T_ki C(λ_i).
        error: the error over λ.
    """

    noise_levels: list[float]
    schedules: list[StrengthSchedule]
    mixing: Tensor
    error: ExportError


class CoreSamples:
    """C at λ (n,), in ascending order: GRID equal steps, and the breakpoints.

    Attributes:
        levels: (n,) float32. breakpoints: the indices of the breakpoints in it. cores: see `cores_over`.
        weights: w (n,), by the trapezoidal rule; they sum to 1. products: M (n, n).
    """

    def __init__(
        self, adapter: Adapter, breakpoints: list[float], density: Density | None, mask_density: Level | None
    ) -> None:
        self.levels = torch.cat([torch.linspace(0, 1, GRID, dtype=torch.float32), as_levels(breakpoints)]).unique()
        self.breakpoints = torch.searchsorted(self.levels, as_levels(breakpoints)).tolist()
        self.cores = cores_over(adapter, self.levels, mask_density)
        self.products = UpdateNorm(adapter).products(self.cores).expand(len(self.levels), len(self.levels))
        widths = _widths(self.levels.double())
        weights = weights_of(density, self.levels) * widths
        self.weights = weights / weights.sum()
        self.floored = self.weights + _FLOOR * widths

    def same(self, one: int, other: int) -> bool:
        """Whether all cores are equal at two points of the grid."""
        return all(len(core) == 1 or torch.equal(core[one], core[other]) for core in self.cores.values())

    def sampled(self, schedules: list[StrengthSchedule], chosen: list[int]) -> Blend:
        """The blend whose C_k is C at the k-th of the points `chosen`."""
        mixing = torch.zeros(len(chosen), len(self.levels), dtype=torch.float64)
        mixing[range(len(chosen)), chosen] = 1
        return self._blend(schedules, self.levels[chosen].tolist(), mixing)

    def fitted(self, schedules: list[StrengthSchedule], noise_levels: list[float]) -> Blend:
        """The blend whose C_k are fitted by least squares."""
        shares = self._shares(schedules)
        weighted = self.floored[:, None] * shares  # (n, K)
        gram = shares.T @ weighted
        unit = gram.diagonal().rsqrt()  # scaled, so that a φ that covers little of [0, 1] loses no digits
        mixing = unit[:, None] * torch.linalg.solve(unit[:, None] * gram * unit, unit[:, None] * weighted.T)
        return self._blend(schedules, noise_levels, mixing)

    def mixed(self, mixing: Tensor) -> dict[CoreKey, Tensor]:
        """Σ_i T_ki C(λ_i): (K or 1, r, r)."""
        return {
            key: core if len(core) == 1 else torch.einsum("kn,nrs->krs", mixing, core)
            for key, core in self.cores.items()
        }

    def _blend(self, schedules: list[StrengthSchedule], noise_levels: list[float], mixing: Tensor) -> Blend:
        E = torch.eye(len(self.levels), dtype=torch.float64) - self._shares(schedules) @ mixing
        errors = ((E @ self.products) * E).sum(1).clamp(min=0).sqrt().tolist()
        sizes, weights = self.products.diagonal().clamp(min=0).sqrt().tolist(), self.weights.tolist()
        error = ExportError(self.levels.tolist(), weights, relative(errors, sizes, weights), [], [])
        return Blend(noise_levels, schedules, mixing, error)

    def _shares(self, schedules: list[StrengthSchedule]) -> Tensor:
        """Φ (n, K), the values of the schedules on the grid."""
        return torch.stack([schedule.at(self.levels) for schedule in schedules], dim=1).double()


def _widths(levels: Tensor) -> Tensor:
    """The weights of the trapezoidal rule at λ (n,), which sum to 1."""
    gaps = levels.diff() / 2
    zero = gaps.new_zeros(1)
    return torch.cat([gaps, zero]) + torch.cat([zero, gaps])
