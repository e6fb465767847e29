"""Cores that don't depend on λ: a learned constant (NaRA-C), and the identity (LoRA)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .float32 import Float32Module
from .hypernetwork import CoreInit


class ConstantCore(Float32Module):
    """NaRA-C: C = I + η D with one learnable D (r, r) and no noise input; an ablation of the paper."""

    needs_noise = False
    needs_density = False

    def __init__(self, rank: int, *, scale: float, init: CoreInit) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.deviation = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float32))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.deviation, a=math.sqrt(5))

    def forward(self, noise_level: Tensor | None = None, mask_density: Tensor | None = None) -> Tensor:
        """→ C (1, r, r), float32."""
        identity = torch.eye(self.rank, dtype=torch.float32, device=self.deviation.device)
        return (identity + self.scale * self.deviation.float())[None]


class IdentityCore(Float32Module):
    """C = I: plain LoRA. It has no parameters, and layers leave it out of the product."""

    needs_noise = False
    needs_density = False

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, noise_level: Tensor | None = None, mask_density: Tensor | None = None) -> Tensor:
        """→ I (1, r, r), float32."""
        return torch.eye(self.rank, dtype=torch.float32)[None]
