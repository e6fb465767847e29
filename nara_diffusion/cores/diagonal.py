"""A diagonal core that is linear in an embedding of time: a gain of its own for each of the r directions.

    C(λ) = diag(W e(λ) + b),      e(λ) = [cos(1000 λ ω), sin(1000 λ ω)],      ω_i = 10000^(−2 i / d),  i < d / 2

W (r, d) starts at zero and b (r,) at one, so that C = I at step 0. e is the sinusoid by which diffusion models read
their timestep, so MultiAlign's γ (of DiffSynth-Studio) is such a core, with d = 256 and core_sharing="layer".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .float32 import Float32Module

TIMESTEPS = 1000
_PERIOD = 10000.0


class DiagonalCore(Float32Module):
    """Args: `rank`, r; `dim`, d, the width of e(λ), even."""

    needs_noise = True
    needs_density = False

    def __init__(self, rank: int, dim: int) -> None:
        super().__init__()
        self.rank = rank
        self.dim = dim
        self.weight = nn.Parameter(torch.zeros(rank, dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.ones(rank, dtype=torch.float32))

    def forward(self, noise_level: Tensor, mask_density: Any = None) -> Tensor:
        """λ (b,) → C (b, r, r), float32."""
        with torch.autocast(noise_level.device.type, enabled=False):
            e = _sinusoid(noise_level.float(), self.dim)  # (b, d)
            return torch.diag_embed(e @ self.weight.float().T + self.bias.float())


def _sinusoid(noise_level: Tensor, dim: int) -> Tensor:
    """λ (b,) → (b, d), float32. Angles go up to 1000: float64, which Apple's GPUs don't have."""
    dtype = torch.float32 if noise_level.device.type == "mps" else torch.float64
    half = dim // 2
    omega = _PERIOD ** (-torch.arange(half, dtype=dtype, device=noise_level.device) / half)
    angles = TIMESTEPS * noise_level[:, None].to(dtype) * omega
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()
