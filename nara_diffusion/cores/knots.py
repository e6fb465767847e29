"""A core that interpolates between learned matrices at K values of λ, its knots.

    C(λ) = I + η Σ_k φ_k(λ) D_k,      φ_k(λ) = max(0, 1 − |λ (K − 1) − k|),   k = 0 … K − 1

D_k (r, r) are learned and start at zero, so that C = I at step 0. φ are the hat functions of linear interpolation: C
changes no faster over λ than between two knots, and each λ trains the two knots beside it alone. With
core_sharing="layer" each adapted module has its own D, at K r² parameters. Not of the paper: see RESULTS.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .float32 import Float32Module


class KnotsCore(Float32Module):
    """Args: `rank`, r; `knots`, K ≥ 2, the first at λ = 0 and the last at λ = 1; `scale`, η."""

    needs_noise = True
    needs_density = False

    def __init__(self, rank: int, knots: int, *, scale: float) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.deviation = nn.Parameter(torch.zeros(knots, rank, rank, dtype=torch.float32))

    def forward(self, noise_level: Tensor, mask_density: Any = None) -> Tensor:
        """λ (b,) → C (b, r, r), float32."""
        knots = len(self.deviation)
        with torch.autocast(noise_level.device.type, enabled=False):
            place = noise_level.float()[:, None] * (knots - 1)  # (b, 1), from 0 to K − 1
            index = torch.arange(knots, device=place.device)
            share = (1 - (place - index).abs()).clamp(min=0)  # (b, K)
            deviation = (share @ self.deviation.float().flatten(1)).view(-1, self.rank, self.rank)
            return torch.eye(self.rank, dtype=torch.float32, device=place.device) + self.scale * deviation
