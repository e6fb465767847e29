"""A core, λ (b,) → C(λ) (b, r, r), and NaRA's core with a hypernetwork, in plain torch.

    ΔW(λ) = s · B · C(λ) · A                                      (NaRA, arXiv 2605.29716, section 4)
    C(λ) = I + η F(e(λ))

Shapes: A (r, d_in), B (d_out, r), λ = noise_level (b,) in [0, 1], 1 = pure noise. The modules
return the deviation D = C − I. A learned D starts at zero, so C = I at step 0. If λ is NaN, so is
C. The cores of other methods are in `other_cores`. `shared_factors` computes B, A and one C for each
of several given updates ΔW (theorem 4.1).

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

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
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
    "film" returns (b, r, r + 1): its last column is β, which layers add to C h.

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
            *hidden, last = self.layers
            for layer in hidden:
                h = F.silu(layer(h))
            return self.scale * last(h).view(-1, self.rank, self.rank)


def shared_factors(updates: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Factor N update matrices into shared B and A and N cores: ΔW_i = B · C_i · A.

    This is theorem 4.1 of the paper. B and A are orthonormal bases of the joint column and row
    spaces, and C_i = Bᵀ ΔW_i Aᵀ. The basis of the smaller space is padded with zeros.

    Args:
        updates: (n, d_out, d_in), float32 or float64, n ≥ 1.
        rank: r. None means the smallest r that reproduces every update, which is the larger of the
            two spaces' dimensions. With a smaller r, only the leading directions are kept.

    Returns:
        B (d_out, r), cores (n, r, r), A (r, d_in).

    Raises:
        ValueError: `rank` is not in [1, max(d_out, d_in)].
    """
    n, d_out, d_in = updates.shape
    if rank is not None and not 1 <= rank <= max(d_out, d_in):
        raise ValueError(
            f"rank is {rank}: it has to lie between 1 and max(d_out, d_in) = {max(d_out, d_in)}."
        )
    U, left, _ = torch.linalg.svd(
        updates.permute(1, 0, 2).reshape(d_out, n * d_in), full_matrices=False
    )
    _, right, Vh = torch.linalg.svd(updates.reshape(n * d_out, d_in), full_matrices=False)
    if rank is None:
        floor = max(d_out, d_in) * n * torch.finfo(updates.dtype).eps
        rank = max(1, *(int((values > floor * values.max()).sum()) for values in (left, right)))
    B, A = _first_columns(U, rank), _first_columns(Vh.T, rank).T
    return B, B.T @ updates @ A.T, A


def _first_columns(basis: Tensor, count: int) -> Tensor:
    """Return the first `count` columns of (d, k), padded with zero columns: (d, count)."""
    return F.pad(basis[:, :count], (0, max(0, count - basis.shape[1])))
