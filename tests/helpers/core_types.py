"""The types of core and their options that are proved alike, by name, and a core of a user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion import NaraConfig

TYPES: dict[str, dict[str, Any]] = {
    "constant": {"core_type": "constant"},
    "normalised constant": {"core_type": "constant", "core_normalization": "frobenius"},
    "rank mask": {"core_type": "rank_mask", "rank_mask_min": 1},
    "bins": {"core_type": "bins", "core_bins": 2},
    "knots": {"core_type": "knots", "core_knots": 4},
    "centred knots": {"core_type": "knots", "core_knots": 4, "core_normalization": "centred"},
    "centred": {"core_normalization": "centred", "noise_scale": "log_snr"},
    "centred vectors": {"core_normalization": "centred", "core_sharing": "layer_embedding", "layer_embedding_dim": 3},
    "log-SNR": {"noise_scale": "log_snr"},
    "normalised": {"core_normalization": "frobenius"},
    "layer vectors": {"core_sharing": "layer_embedding", "layer_embedding_dim": 3},
    "by type, normalised": {"core_sharing": "module_type", "core_normalization": "frobenius"},
    "vectors, log-SNR": {"core_sharing": "layer_embedding", "noise_scale": "log_snr", "noise_embedding": "mlp"},
}


class Affine(nn.Module):
    """C(λ) = I + λ P + Q, with a counter that is no floating-point tensor."""

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.P, self.Q = nn.Parameter(torch.zeros(rank, rank)), nn.Parameter(torch.zeros(rank, rank))
        self.register_buffer("version", torch.tensor(3))

    def forward(self, noise_level: Tensor) -> Tensor:
        return torch.eye(len(self.P), device=noise_level.device) + noise_level[:, None, None] * self.P + self.Q
