"""The noise-conditioned core C(λ), with torch alone.

    ΔW(λ) = s · B · C(λ) · A          C(λ) = I + η · F(e(λ))                     (NaRA, arXiv 2605.29716, section 4)

Shapes: A (r, d_in), C (b, r, r), B (d_out, r), λ = noise_level (b,) in [0, 1], 1 = pure noise. A core is a module
λ (b,) → C (b, r, r), or (1, r, r) where C does not depend on the sample. Its class attribute `needs_noise` says
whether λ has to be known at all.

Different from the reference implementation on purpose: C is one matrix per *sample*; the product is B·C·A as in the
paper (the reference computes B·Cᵀ·A); every core stores float32 and computes in float32, whatever the model does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embeddings import Embedding, LayerVectors, NoiseScale, rescaled
from .float32 import Dense, Float32Module

CoreInput = Literal["noise_level", "mask_density", "both"]
CoreInit = Literal["zero_last", "kaiming", "zero_all"]
CoreNormalization = Literal["none", "frobenius", "centred"]
GRID = 64  # noise levels over which a centred core takes its mean


class HypernetworkCore(Float32Module):
    """C(λ) = I + η F(e(λ)): F is Linear–SiLU–…–Linear with output r², shared by all layers of its group.

    With `layers`, F reads a vector z of the layer beside e(λ), and each has its own C_l(λ) = I + η F(e(λ), z_l).

    Args:
        rank: r, the largest rank that reads this core. A layer of smaller rank r' reads C(λ)[:r', :r'].
        scale: η, `core_scale`.
        hidden_dims: widths of F's hidden layers.
        init: "zero_last" and "zero_all" give C = I exactly at step 0; "kaiming" does not.
        core_input: which signals are embedded: λ, the mask density (b,), or both (embeddings concatenated).
        embedding: makes one embedding of a signal; called once a signal.
        noise_scale: the scale on which λ is embedded.
        normalization: see `normalized`; "centred", C(λ) = I + η (F(e(λ)) − mean of F(e(λ')) over λ').
        layers: names of the layers that have a C of their own each, "." written as "-".
        layer_dim: width of z, learnable, N(0, 1) at first.
    """

    needs_noise = True

    def __init__(
        self,
        rank: int,
        *,
        scale: float,
        hidden_dims: Sequence[int],
        init: CoreInit,
        core_input: CoreInput,
        embedding: Callable[[], Embedding],
        noise_scale: NoiseScale = "linear",
        normalization: CoreNormalization = "none",
        layers: Sequence[str] = (),
        layer_dim: int = 0,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.noise_scale: NoiseScale = noise_scale
        self.normalization: CoreNormalization = normalization
        signals = ("noise_level", "mask_density") if core_input == "both" else (core_input,)
        embeddings = {signal: embedding() for signal in signals}
        widths = [sum(e.out_dim for e in embeddings.values()) + layer_dim, *hidden_dims, rank * rank]
        dense = [Dense(i, o) for i, o in itertools.pairwise(widths)]
        if normalization == "centred":  # the last bias would be part of every C, and so of none
            dense[-1] = Dense(*widths[-2:], bias=False)
        for layer in dense:
            layer.reset(zero=init == "zero_all" or (init == "zero_last" and layer is dense[-1]))
        self.embeddings = nn.ModuleDict(embeddings)
        self.layers = nn.ModuleList(dense)
        self.layer_embeddings = LayerVectors(layers, layer_dim) if layers else None

    @property
    def layer_names(self) -> list[str]:
        """Of layers that have a C of their own each."""
        return [] if self.layer_embeddings is None else [name for name, _ in self.layer_embeddings.named_parameters()]

    @property
    def needs_density(self) -> bool:
        return "mask_density" in self.embeddings

    def forward(self, noise_level: Tensor, mask_density: Tensor | None = None) -> Tensor:
        """λ (b,), density (b,) or None → C (b, r, r), float32; with `layers` (l, b, r, r)."""
        with torch.autocast(noise_level.device.type, enabled=False):
            if self.normalization == "centred":
                deviation = self._centred_deviation(noise_level.float())
            else:
                deviation = self._deviation(noise_level.float(), mask_density)
            identity = torch.eye(self.rank, dtype=torch.float32, device=deviation.device)
            return normalized(identity + self.scale * deviation, self.normalization)

    def _deviation(self, noise_level: Tensor, mask_density: Tensor | None) -> Tensor:
        """F, (b, r, r) or (l, b, r, r)."""
        level = rescaled(noise_level, self.noise_scale)
        signals = {"noise_level": level, "mask_density": None if mask_density is None else mask_density.float()}
        h = torch.cat([embed(signals[name]) for name, embed in self.embeddings.items()], dim=-1)  # (b, e)
        if self.layer_embeddings is not None:
            h = _beside_each(h, self.layer_embeddings())  # (l, b, e + z)
        for layer in self.layers[:-1]:
            h = F.silu(layer(h))
        return self.layers[-1](h).unflatten(-1, (self.rank, self.rank))

    def _centred_deviation(self, noise_level: Tensor) -> Tensor:
        """F less its mean over λ."""
        grid = (torch.arange(GRID, dtype=torch.float32, device=noise_level.device) + 0.5) / GRID
        own, over = self._deviation(torch.cat([noise_level, grid]), None).split([len(noise_level), GRID], dim=-3)
        return own - over.mean(-3, keepdim=True)


def _beside_each(h: Tensor, z: Tensor) -> Tensor:
    """h (b, e) beside each row of z (l, z) → (l, b, e + z)."""
    return torch.cat([h.expand(len(z), -1, -1), z[:, None].expand(-1, len(h), -1)], dim=-1)


def normalized(core: Tensor, kind: CoreNormalization) -> Tensor:
    """C (…, r, r) as √r C / ‖C‖_F for "frobenius": of the size of I, whatever λ is; else as it is."""
    if kind != "frobenius":
        return core
    mean_square = core.square().sum((-2, -1), keepdim=True) / core.shape[-1]  # exactly 1 where C = I
    return core / mean_square.sqrt()
