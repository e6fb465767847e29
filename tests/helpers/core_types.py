"""A custom core."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nara_diffusion import NaraConfig


class Affine(nn.Module):
    """C(λ) = I + λ P + Q, with a counter that is no floating-point tensor."""

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.P, self.Q = nn.Parameter(torch.zeros(rank, rank)), nn.Parameter(torch.zeros(rank, rank))
        self.register_buffer("version", torch.tensor(3))

    def forward(self, noise_level: Tensor) -> Tensor:
        return torch.eye(len(self.P), device=noise_level.device) + noise_level[:, None, None] * self.P + self.Q
