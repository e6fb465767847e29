"""Cores without parameters: C(λ) is diagonal, and its 0/1 entries say which of the r directions serve noise level λ.

    T-LoRA       C(λ) = diag(1 for i < r(λ), else 0),   r(λ) = ⌊(r − r_min)(1 − λ)⌋ + r_min   (arXiv 2507.05964)
    Multi-LoRA   C(λ) = diag(1 for i in block k(λ), else 0),   k(λ) = min(⌊λ K⌋, K − 1)          (NaRA's baseline)

A direction that is switched off adds nothing to the output, and its rows of A and columns of B get a gradient of
exactly zero. (AdamW still moves what it has trained before, for as long as its running mean of gradients lasts.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .float32 import Float32Module


class RankMaskCore(Float32Module):
    """T-LoRA: the first r(λ) of r directions; all of them without noise, `min_rank` in pure noise.

    By the paper's ⌊⌋ the last direction serves λ = 0 alone, so that masked-diffusion language models never train it.

    Args:
        rank: r. min_rank: r_min in [1, r], or None for half of r, at least 1.
    """

    needs_noise = True
    needs_density = False

    def __init__(self, rank: int, min_rank: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.min_rank = max(1, rank // 2) if min_rank is None else min(min_rank, rank)

    def forward(self, noise_level: Tensor, mask_density: Any = None) -> Tensor:
        """λ (b,) → C (b, r, r), float32."""
        directions = torch.arange(self.rank, device=noise_level.device)  # (r,)
        return torch.diag_embed((directions < self.active_rank(noise_level)[:, None]).float())

    def active_rank(self, noise_level: Tensor) -> Tensor:
        """r(λ) (b,), as a float."""
        return floor_of_share(self.rank - self.min_rank, 1 - noise_level.float()) + self.min_rank


class BinsCore(Float32Module):
    """Multi-LoRA: one block of r / K directions for each of K equal bins of λ.

    Each block is a LoRA of its own, trained and used in its bin alone. Its scale is that of the whole: lora_alpha / r
    with r the *total* rank, so that lora_alpha = K · α gives each block the scale α / (r / K) of a single LoRA. With
    DoRA all blocks share one magnitude.

    Args:
        rank: r, a multiple of `bins`. bins: K.
    """

    needs_noise = True
    needs_density = False

    def __init__(self, rank: int, bins: int) -> None:
        super().__init__()
        self.rank = rank
        self.bins = bins

    def forward(self, noise_level: Tensor, mask_density: Any = None) -> Tensor:
        """λ (b,) → C (b, r, r), float32."""
        block = torch.arange(self.rank, device=noise_level.device) // (self.rank // self.bins)  # (r,)
        return torch.diag_embed((block == self.chosen_bin(noise_level)[:, None]).float())

    def chosen_bin(self, noise_level: Tensor) -> Tensor:
        """k(λ) (b,), as a float."""
        return floor_of_share(self.bins, noise_level.float()).clamp(max=self.bins - 1)


def floor_of_share(count: int, share: Tensor) -> Tensor:
    """⌊count · share⌋ for a share (b,) in [0, 1] that stands for a fraction such as t / 1000, rounded to float32.

    The product may come out a few roundings, each below count · 2⁻²⁴, under the integer that it stands for, hence
    what is added. For fractions of 1000 and a count below 1000 it is far less than the way to the next integer.
    """
    return torch.floor(count * share + count * 2.0**-21)
