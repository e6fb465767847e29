"""How much the gradients of two bins of λ differ, freed of the noise that few samples bring.

    M_kl ≈ ⟨g_k, g_l⟩,   w_k the share of the samples in bin k,   ḡ = Σ_k w_k g_k
    lost share = 1 − ‖ḡ‖² / Σ_k w_k ‖g_k‖²,   conflict = Σ_k w_k ‖g_k − ḡ‖² = Σ_k w_k ‖g_k‖² − ‖ḡ‖²

g_k is known only as a mean over samples, and ‖mean‖² = ‖g_k‖² + its variance. So M_kk is the product of the means of
two halves of the bin's samples, which are independent, and M_kl, k ≠ l, that of the bins' means: both are unbiased.
The first step of a descent gains ‖ḡ‖² of the Σ w_k ‖g_k‖² that it gains where each bin may go its own way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_HALF = 4  # samples; bins with fewer are left out


@dataclass(frozen=True)
class BinComparison:
    """Attributes:
    bins: the numbers of the K bins that have samples.
    weights: (K,), w.
    products: (K, K), M.
    noisy: (K,), ‖a‖ ‖b‖ of the two halves' means, by which M_kk is their cosine.
    """

    bins: list[int]
    weights: Tensor
    products: Tensor
    noisy: Tensor

    @property
    def energy(self) -> float:
        """Σ w ‖g_k‖²."""
        return (self.weights * self.products.diagonal()).sum().item()

    @property
    def common(self) -> float:
        """‖ḡ‖²."""
        return (self.weights @ self.products @ self.weights).item()

    @property
    def conflict(self) -> float:
        """Σ w ‖g_k − ḡ‖²; noise may take it below 0, so that sums over layers stay without bias."""
        return self.energy - self.common

    @property
    def lost_share(self) -> float:
        """conflict / energy; nan where no gradient shows."""
        return self.conflict / self.energy if self.energy > 0 else float("nan")

    @property
    def reliability(self) -> float:
        """How much of the halves' means is gradient rather than noise: their cosine, bins counting by their energy."""
        noisy = (self.weights * self.noisy).sum().item()
        return self.energy / noisy if noisy > 0 else 0.0

    @property
    def cosines(self) -> list[list[float | None]]:
        """(K, K); None where a bin's gradient doesn't show above the noise."""
        own = self.products.diagonal()
        scale = (own[:, None] * own[None]).sqrt()
        shown = (own > 0)[:, None] & (own > 0)[None]
        return [
            [(product / by).clamp(-1, 1).item() if seen else None for product, by, seen in zip(*row, strict=True)]
            for row in zip(self.products, scale, shown, strict=True)
        ]


def compare_bins(grams: Iterable[Tensor], counts: Tensor) -> BinComparison:
    """From the products (bins, 2, bins, 2) of sums over samples, which are added, and their numbers (bins, 2).

    Raises:
        ValueError: fewer than two bins have samples.
    """
    kept = (counts >= SMALLEST_HALF).all(1).nonzero().flatten()
    if len(kept) < 2:
        raise ValueError(
            f"the samples' noise levels lie in {len(kept)} of {len(counts)} bins, with {SMALLEST_HALF} in each half: "
            "gradients are compared between two at least. Measure more samples, or a wider window of λ."
        )
    numbers = counts[kept].double()  # (K, 2)
    means = sum(grams)[kept][:, :, kept] / numbers[:, :, None, None] / numbers  # type: ignore[index]
    share = numbers / numbers.sum(1, keepdim=True)  # of a half in its bin
    products = torch.einsum("ki,kilj,lj->kl", share, means, share)
    index = torch.arange(len(kept))
    products[index, index] = means[index, 0, index, 1]
    noisy = (means[index, 0, index, 0] * means[index, 1, index, 1]).sqrt()
    return BinComparison(kept.tolist(), numbers.sum(1) / numbers.sum(), products, noisy)
