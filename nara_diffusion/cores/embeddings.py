"""e(λ): what the hypernetwork reads of the noise level, and on which scale.

    linear    u = λ
    log_snr   u = ½ − log((1 − λ) / λ) / 2a, clipped to [0, 1], a = 5: 0 below λ = 0.0067, 1 above 0.9933

Both scales grow with the noise from 0 to 1. The second spreads out both ends of λ, at which a linear one hardly moves:
for λ the share of noise in a mixture, (1 − λ) / λ is the ratio of signal to noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .float32 import Dense, Float32Module

NoiseScale = Literal["linear", "log_snr"]
LOG_SNR_LIMIT = 5.0


def rescaled(noise_level: Tensor, scale: NoiseScale) -> Tensor:
    """λ (b,) in [0, 1] on the scale of that name, u (b,) in [0, 1]."""
    if scale == "linear":
        return noise_level
    least = 1 / (1 + math.exp(LOG_SNR_LIMIT))
    return 0.5 + torch.logit(noise_level, eps=least) / (2 * LOG_SNR_LIMIT)


class FourierEmbedding(Float32Module):
    """e(λ) = [sin(λ w), cos(λ w)], w ~ N(0, scale²) frozen. (b,) → (b, dim). No factor 2π, as in the reference."""

    frequencies: Tensor

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.out_dim = dim
        self.register_buffer("frequencies", torch.randn(dim // 2, dtype=torch.float32) * scale)

    def forward(self, noise_level: Tensor) -> Tensor:
        angle = noise_level[:, None] * self.frequencies.float()  # (b, dim / 2)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class MlpEmbedding(Float32Module):
    """e(λ) = SiLU(w λ + b), learnable. (b,) → (b, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim
        self.projection = Dense(1, dim)
        self.projection.reset(zero=False)

    def forward(self, noise_level: Tensor) -> Tensor:
        return F.silu(self.projection(noise_level[:, None]))


class RawEmbedding(Float32Module):
    """e(λ) = λ. (b,) → (b, 1)."""

    out_dim = 1

    def forward(self, noise_level: Tensor) -> Tensor:
        return noise_level[:, None]


Embedding = FourierEmbedding | MlpEmbedding | RawEmbedding


def make_embedding(kind: str, dim: int, scale: float) -> Embedding:
    """The embedding named `kind`: "fourier", "mlp" or "raw"."""
    if kind == "fourier":
        return FourierEmbedding(dim, scale)
    return MlpEmbedding(dim) if kind == "mlp" else RawEmbedding()


class LayerVectors(Float32Module):
    """z: one learnable vector for each named layer, N(0, 1) at first. () → (l, dim).

    Vectors are parameters of this module itself, which is called for them, so that offloading brings them in.
    """

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(dim, dtype=torch.float32)))

    def forward(self) -> Tensor:
        return torch.stack(list(self.parameters()))
