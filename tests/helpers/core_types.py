"""The types of core and their options that are proved alike, by name, and a custom core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion import NaraConfig

TYPES: dict[str, dict[str, Any]] = {
    "constant": {"core_type": "constant"},
    "rank mask": {"core_type": "rank_mask", "rank_mask_min": 1},
    "bins": {"core_type": "bins", "core_bins": 2},
    "knots": {"core_type": "knots", "core_knots": 4},
    "by type, mlp": {"core_sharing": "module_type", "noise_embedding": "mlp"},
    "by layer": {"core_sharing": "layer", "core_init": "kaiming"},
}


class Affine(nn.Module):
    """C(λ) = I + λ P + Q, with a counter that is no floating-point tensor."""

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.P, self.Q = nn.Parameter(torch.zeros(rank, rank)), nn.Parameter(torch.zeros(rank, rank))
        self.register_buffer("version", torch.tensor(3))

    def forward(self, noise_level: Tensor) -> Tensor:
        return torch.eye(len(self.P), device=noise_level.device) + noise_level[:, None, None] * self.P + self.Q


class Still(Affine):
    """C = I + Q, without λ."""

    needs_noise = False

    def forward(self) -> Tensor:
        return (torch.eye(len(self.P)) + self.Q)[None]
