"""e(λ): the embeddings of the noise level that the hypernetwork reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .float32 import Dense, Float32Module


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
