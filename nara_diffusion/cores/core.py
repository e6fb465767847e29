"""The cores: λ (b,) → C(λ) (b, r, r), in plain torch.

    ΔW(λ) = s · B · C(λ) · A                                      (NaRA, arXiv 2605.29716, section 4)

    hypernetwork  C(λ) = I + η F(e(λ)): NaRA
    constant      C = I + η D, one learned D (r, r); an ablation of the paper (NaRA-C)
    identity      C = I: LoRA
    knots         C(λ) = I + η Σ_k φ_k(λ) D_k
                  φ_k(λ) = max(0, 1 − |λ (K − 1) − k|),   k = 0 … K − 1
    rank_mask     C(λ) = diag(1 for i < r(λ), else 0)             (T-LoRA, arXiv 2507.05964)
                  r(λ) = ⌊(r − r_min)(1 − λ)⌋ + r_min
    bins          C(λ) = diag(1 for i in block k(λ), else 0)      (Multi-LoRA)
                  k(λ) = min(⌊λ K⌋, K − 1)

Shapes: A (r, d_in), B (d_out, r), λ = noise_level (b,) in [0, 1], 1 = pure noise. The modules
return the deviation D = C − I. A learned D starts at zero, so C = I at step 0. If λ is NaN, so is
C. Masks have no parameters. A direction that is off adds nothing to the output, and its row of A
and column of B get a gradient of exactly zero. (AdamW still moves directions that it trained
before, until its running mean of gradients has decayed.)

This module deliberately differs from the reference implementation in three ways. There is one C for
each *sample*. The product is B·C·A as in the paper (the reference computes B·Cᵀ·A). Every core
stores its parameters and computes in float32, whatever the dtype of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CoreInit = Literal["zero_last", "kaiming", "zero_all"]


# ---------------------------------------------------------------------- float32


def is_autocast_enabled(device: torch.device) -> bool:
    """Return whether autocast is on for `device`.

    On "meta" there is no autocast, and PyTorch would raise an error.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off for `device` inside the context.

    Entering `torch.autocast` takes longer than a small matrix product, so it is entered only if
    autocast is on.
    """
    return (
        torch.autocast(device.type, enabled=False) if is_autocast_enabled(device) else nullcontext()
    )


class Float32Module(nn.Module):
    """A module that follows `.to(device)` but keeps its floating-point tensors in float32.

    In bfloat16, C − I would change by five per cent, so `model.to(bfloat16)` leaves these tensors
    in float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the tensors of this module and its submodules as float32.

        `assign=True` would keep the dtypes of `state_dict`, which is a copy.
        """
        for key, tensor in state_dict.items():
            if key.startswith(prefix) and isinstance(tensor, Tensor) and tensor.is_floating_point():
                state_dict[key] = tensor.float()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Dense(Float32Module):
    """y = x Wᵀ + b in float32, zero until `reset`.

    This class does not derive from `nn.Linear`, so quantisers, casters and "all-linear" skip it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))

    def reset(self, zero: bool) -> None:
        """Set the weight to zero, or to Kaiming-uniform values with a = √5 (paper, appendix).

        The bias becomes zero in both cases.
        """
        nn.init.zeros_(self.bias)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias.float())


class Core(Float32Module):
    """λ (b,) → the deviation D = C − I (b, r, r), or (1, r, r) if all samples share it; float32.

    D is small, so layers compute C h as h + D h. Half precision then does not round D away.

    Attributes:
        rank: r, the largest rank that reads this core. A layer of smaller rank r' reads
            C[:r', :r'].
        needs_noise: whether the core reads λ. If False, the core is called without arguments.
    """

    needs_noise: bool = True

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def at(self, noise_level: Tensor | None = None) -> Tensor:
        """Return D (b or 1, r, r), float32, at λ on any device.

        A core without noise input ignores λ.
        """
        if not self.needs_noise:
            return self()
        assert noise_level is not None
        return self(noise_level.to(self._device(noise_level.device)))

    def _device(self, default: torch.device) -> torch.device:
        """Return the device of the core's tensors.

        Return `default` if there are no tensors, or if all of them stay on "meta" until
        accelerate's hooks load them.
        """
        device = None
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            device = tensor.device
            if device.type != "meta":
                return device
        is_offloaded = any("_hf_hook" in vars(module) for module in self.modules())
        return default if is_offloaded or device is None else device


# ---------------------------------------------------------------------- the hypernetwork


class NoiseEmbedding(Float32Module):
    """Embed λ (b,) as e(λ) (b, out_dim).

    fourier   [sin(λ w), cos(λ w)] with dim / 2 frozen w ~ N(0, scale²); as in the reference, there
              is no factor 2π
    mlp       SiLU(w λ + b) of width dim, learnable
    raw       λ itself, with width 1
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
    """The core C(λ) = I + η F(e(λ)) of NaRA, with a hypernetwork F.

    F is Linear–SiLU–…–Linear with r² outputs. All layers of a group share one F.

    Args:
        rank: r.
        scale: η, `core_scale`.
        hidden_dims: the widths of F's hidden layers.
        init: "zero_last" and "zero_all" make C = I exactly at step 0; "kaiming" does not.
        embedding: the module that computes e(λ).
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


# ---------------------------------------------------------------------- cores without a hypernetwork


class ConstantCore(Core):
    """The core C = I + η D of NaRA-C, with one learnable D (r, r) and no noise input."""

    needs_noise = False

    def __init__(self, rank: int, *, scale: float, init: CoreInit) -> None:
        super().__init__(rank)
        self.scale = scale
        self.deviation = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float32))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.deviation, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """Return η D (1, r, r), float32."""
        return (self.scale * self.deviation.float())[None]


class IdentityCore(Core):
    """The core C = I of plain LoRA; it has no parameters, and layers skip it in the product."""

    needs_noise = False

    def forward(self) -> Tensor:
        """Return zeros (1, r, r), float32."""
        return torch.zeros(1, self.rank, self.rank, dtype=torch.float32)


class KnotsCore(Core):
    """A core that interpolates between learned matrices at K equidistant values of λ.

    This core is not in the paper; see RESULTS.md. C is linear in λ between two knots, and each λ
    trains only the two nearest knots.

    Args:
        rank: r.
        knots: K ≥ 2, the first at λ = 0 and the last at λ = 1.
        scale: η.
    """

    def __init__(self, rank: int, knots: int, *, scale: float) -> None:
        super().__init__(rank)
        self.scale = scale
        self.deviation = nn.Parameter(torch.zeros(knots, rank, rank, dtype=torch.float32))

    def forward(self, noise_level: Tensor) -> Tensor:
        """Return η Σ_k φ_k(λ) D_k (b, r, r), float32, for λ (b,)."""
        knots = len(self.deviation)
        with without_autocast(noise_level.device):
            place = noise_level.float()[:, None] * (knots - 1)  # (b, 1), from 0 to K − 1
            index = torch.arange(knots, device=place.device)
            share = (1 - (place - index).abs()).clamp(min=0)  # (b, K)
            deviation = share @ self.deviation.float().flatten(1)
            return self.scale * deviation.view(-1, self.rank, self.rank)


class RankMaskCore(Core):
    """The core of T-LoRA, which keeps only the first r(λ) of the r directions.

    All directions are on at λ = 0, and `min_rank` of them at λ = 1. Because the paper rounds down,
    the last direction is on only at λ = 0, so masked-diffusion language models never train it.

    Args:
        rank: r.
        min_rank: r_min in [1, r], or None for half of r, at least 1.
    """

    def __init__(self, rank: int, min_rank: int | None = None) -> None:
        super().__init__(rank)
        self.min_rank = max(1, rank // 2) if min_rank is None else min(min_rank, rank)

    def forward(self, noise_level: Tensor) -> Tensor:
        """Return C − I (b, r, r), float32, for λ (b,): −1 for each direction that is off."""
        directions = torch.arange(self.rank, device=noise_level.device)  # (r,)
        is_off = directions >= self.active_rank(noise_level)[:, None]  # (b, r)
        return torch.diag_embed(0 * noise_level.float()[:, None] - is_off.float())

    def active_rank(self, noise_level: Tensor) -> Tensor:
        """Return r(λ) (b,), as a float."""
        return _floor_of_share(self.rank - self.min_rank, 1 - noise_level.float()) + self.min_rank


class BinsCore(Core):
    """The core of Multi-LoRA, a baseline of the paper, with r / K directions for each of K bins.

    The K bins of λ are equally wide. The directions of a bin form a block, a separate LoRA that is
    trained and used only in its bin. Its scale is lora_alpha / r with the *total* rank r, so
    lora_alpha = K · α scales it by α / (r / K). With DoRA, all blocks share one magnitude.

    Args:
        rank: r, a multiple of `bins`.
        bins: K.
    """

    def __init__(self, rank: int, bins: int) -> None:
        super().__init__(rank)
        self.bins = bins

    def forward(self, noise_level: Tensor) -> Tensor:
        """Return C − I (b, r, r), float32, for λ (b,): −1 for each direction that is off."""
        directions = torch.arange(self.rank, device=noise_level.device)  # (r,)
        block = directions // (self.rank // self.bins)
        is_off = block != self.chosen_bin(noise_level)[:, None]  # (b, r)
        return torch.diag_embed(0 * noise_level.float()[:, None] - is_off.float())

    def chosen_bin(self, noise_level: Tensor) -> Tensor:
        """Return k(λ) (b,), as a float."""
        return _floor_of_share(self.bins, noise_level.float()).clamp(max=self.bins - 1)


def _floor_of_share(count: int, share: Tensor) -> Tensor:
    """Return ⌊count · share⌋ for a share (b,) in [0, 1], a fraction such as t / 1000 in float32.

    If the exact product is an integer, a few rounding errors, each below count · 2⁻²⁴, may leave
    the computed product just under it. Adding count · 2⁻²¹ corrects this. For multiples of 1/1000
    and a count below 1000, this is far less than the distance to the next integer.
    """
    return torch.floor(count * share + count * 2.0**-21)
