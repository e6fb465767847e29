"""The noise-conditioned core C(λ), with torch only.

    ΔW(λ) = s · B · C(λ) · A      C(λ) = I + η · F(e(λ))      (NaRA, arXiv 2605.29716, section 4)

Shapes: A (r, d_in), C (b, r, r), B (d_out, r), λ = noise_level (b,) in [0, 1], 1 = pure noise.

Deliberate differences from the reference implementation: there is one C for each *sample*; the
product is B·C·A as in the paper (the reference computes B·Cᵀ·A); and every core stores and computes
in float32, whatever the model does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .float32 import Core, Dense, Float32Module, without_autocast

CoreInit = Literal["zero_last", "kaiming", "zero_all"]


class NoiseEmbedding(Float32Module):
    """e(λ): (b,) → (b, out_dim).

    fourier   [sin(λ w), cos(λ w)] with dim / 2 frozen w ~ N(0, scale²); as in the reference, there
              is no factor 2π
    mlp       SiLU(w λ + b) of width dim, learnable
    raw       λ itself, of width 1
    """

    frequencies: Tensor

    def __init__(self, kind: str, dim: int, scale: float) -> None:
        super().__init__()
        self.kind = kind
        self.out_dim = 1 if kind == "raw" else dim
        if kind == "fourier":
            self.register_buffer("frequencies", torch.randn(dim // 2, dtype=torch.float32) * scale)
        elif kind == "mlp":
            self.projection = Dense(1, dim)
            self.projection.reset(zero=False)

    def forward(self, noise_level: Tensor) -> Tensor:
        level = noise_level[:, None]
        if self.kind == "fourier":
            angle = level * self.frequencies.float()  # (b, dim / 2)
            return torch.cat([angle.sin(), angle.cos()], dim=-1)
        return F.silu(self.projection(level)) if self.kind == "mlp" else level


class HypernetworkCore(Core):
    """C(λ) = I + η F(e(λ)); F is Linear–SiLU–…–Linear with output r².

    All layers of a group share one F.

    Args:
        rank: r.
        scale: η, `core_scale`.
        hidden_dims: widths of F's hidden layers.
        init: "zero_last" and "zero_all" make C = I exactly at step 0; "kaiming" does not.
        embedding: e(λ).
    """

    def __init__(
        self,
        rank: int,
        *,
        scale: float,
        hidden_dims: Sequence[int],
        init: CoreInit,
        embedding: NoiseEmbedding,
    ) -> None:
        super().__init__(rank)
        self.scale = scale
        widths = [embedding.out_dim, *hidden_dims, rank * rank]
        dense = [Dense(i, o) for i, o in itertools.pairwise(widths)]
        for layer in dense:
            layer.reset(zero=init == "zero_all" or (init == "zero_last" and layer is dense[-1]))
        self.embeddings = nn.ModuleDict({"noise_level": embedding})  # its name in files
        self.layers = nn.ModuleList(dense)

    def forward(self, noise_level: Tensor) -> Tensor:
        """Return D = η F(e(λ)) (b, r, r), float32, for λ (b,)."""
        with without_autocast(noise_level.device):
            h = self.embeddings["noise_level"](noise_level.float())  # (b, e)
            for layer in self.layers[:-1]:
                h = F.silu(layer(h))
            return self.scale * self.layers[-1](h).unflatten(-1, (self.rank, self.rank))
