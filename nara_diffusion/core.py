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
import math
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


class ConstantCore(Float32Module):
    """NaRA-C: C = I + η D with one learnable D (r, r) and no noise input; an ablation of the paper."""

    needs_noise = False
    needs_density = False

    def __init__(self, rank: int, *, scale: float, init: CoreInit, normalization: CoreNormalization = "none") -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.normalization: CoreNormalization = normalization
        self.deviation = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float32))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.deviation, a=math.sqrt(5))

    def forward(self, noise_level: Tensor | None = None, mask_density: Tensor | None = None) -> Tensor:
        """→ C (1, r, r), float32."""
        identity = torch.eye(self.rank, dtype=torch.float32, device=self.deviation.device)
        return normalized((identity + self.scale * self.deviation.float())[None], self.normalization)


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


def mix(core: Tensor, h: Tensor) -> Tensor:
    """C h for each row of h: (b or 1, r, r), (b, …, r) → (b, …, r).

    It is computed in float32 at least, also under autocast, so that C − I is not rounded. (B·C first would be the
    same, but turns every large product of the layer, and of its backward, into a batched one.)
    """
    with torch.autocast(h.device.type, enabled=False):
        return mix_rows(core, h)


def mix_rows(core: Tensor, h: Tensor) -> Tensor:
    """`mix` where autocast is known to be off."""
    if core.dtype == h.dtype and core.device == h.device:
        return _mix_alike(core, h)
    dtype = torch.promote_types(h.dtype, torch.float32)
    return _mix_alike(core.to(h.device, dtype), h.to(dtype)).to(h.dtype)


def _mix_alike(core: Tensor, h: Tensor) -> Tensor:
    if core.shape[0] == 1:
        return F.linear(h, core[0])
    if h.dim() == 3:
        return torch.bmm(h, core.mT)
    if h.is_nested:
        return torch.matmul(h, core.mT.reshape(core.shape[0], *(1,) * (h.dim() - 3), *core.shape[1:]))
    return torch.bmm(h.reshape(h.shape[0], -1, h.shape[-1]), core.mT).view(h.shape)


def mix_channels(core: Tensor, h: Tensor) -> Tensor:
    """The same where the r features are channels: (b or 1, r, r), (b, r, …) → (b, r, …)."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    with torch.autocast(h.device.type, enabled=False):
        mixed = torch.matmul(core.to(h.device, dtype), h.to(dtype).flatten(2))
    return mixed.view(h.shape).to(h.dtype)


def add_product(base: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """base + s · h Bᵀ by one product: base (…, d_out), h (…, r), B (d_out, r)."""
    dtype = torch.promote_types(base.dtype, h.dtype)
    rows = base.to(dtype).reshape(-1, base.shape[-1])
    return torch.addmm(rows, h.to(dtype).reshape(-1, h.shape[-1]), B.to(dtype).T, alpha=scaling).view(base.shape)


def add_scaled_product(base: Tensor, h: Tensor, B: Tensor, gain: Tensor, scaling: float) -> Tensor:
    """gain ⊙ (base + s · h Bᵀ): base (b, …, d_out), h (b, …, r), B (d_out, r), gain (b or 1, d_out).

    The gain goes onto `base` and onto B, so that the product is added in place: one large tensor instead of two.
    """
    batch, width = gain.shape
    scaled = base.reshape(batch, -1, width) * gain[:, None]  # (b, n, d_out), or (1, b n, d_out)
    rows = h.reshape(batch, -1, h.shape[-1])
    rising = (gain[..., None] * B).transpose(1, 2)  # (b, r, d_out)
    if scaled.dtype == rows.dtype:
        return scaled.baddbmm_(rows, rising.to(rows.dtype), alpha=scaling).view(base.shape)
    return (scaled + scaling * torch.bmm(rows, rising.to(rows.dtype))).view(base.shape)


def times_core(B: Tensor, core: Tensor) -> Tensor:
    """K = B·C for norms and merging: (d_out, r), (b, r, r) → (b, d_out, r), float32 at least, not part of the graph.

    By one plain product Cᵀ Bᵀ: `matmul` would choose its way, and so the last bits, by whether B is trainable.
    """
    batch, rank, _ = core.shape
    B, core = B.detach(), core.detach()
    dtype = torch.promote_types(B.dtype, torch.float32)
    with torch.autocast(B.device.type, enabled=False):
        rows = core.to(B.device, dtype).transpose(1, 2).reshape(batch * rank, rank)
        return (rows @ B.to(dtype).T).view(batch, rank, -1).transpose(1, 2)


def factored_row_norm(weight: Tensor, A: Tensor, K: Tensor, scaling: float) -> Tensor:
    """‖W0 + s K A‖ by row, without the (b, d_out, d_in) product; for NaRA-DoRA (paper, appendix M).

        ‖W0 + s K A‖²_row = ‖W0‖²_row + Σ_r K ⊙ (2 s P + s² K G),   P = W0 Aᵀ (d_out, r),  G = A Aᵀ (r, r)

    Args:
        weight: W0 (d_out, d_in). A: (r, d_in). K: B·C (b, d_out, r). scaling: s.

    Returns:
        (b, d_out), float32 at least, not part of the graph: DoRA treats the norm as a constant (DoRA, section 4.3).
    """
    dtype = torch.promote_types(weight.dtype, K.dtype)  # float32 or float64
    weight, A, K = weight.detach(), A.detach(), K.detach()
    with torch.autocast(weight.device.type, enabled=False):
        P = (A.to(weight.dtype) @ weight.T).to(dtype)  # transposed like all that follows: sums run along d_out
        A, K = A.to(dtype), K.to(dtype).transpose(1, 2)  # (b, r, d_out)
        G = (A @ A.T).expand(K.shape[0], -1, -1)
        base = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()  # (d_out,)
        update = torch.bmm(G, K).mul_(scaling**2).add_(P, alpha=2 * scaling).mul_(K).sum(1)
        return update.add_(base).clamp_min_(torch.finfo(dtype).tiny).sqrt_()
