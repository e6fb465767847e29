"""C h on rows and channels, B·C, and DoRA's norm; with torch only.

Shapes: A (r, d_in), C (b, r, r), or (1, r, r) if the batch shares it, B (d_out, r).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nara_diffusion.cores.float32 import is_autocast_enabled, without_autocast

SLICE = 2**22
"""Elements of W0 converted to float32 at once for DoRA's norm: 16 MiB, which may fit the cache."""


def apply_core(core: Tensor, h: Tensor) -> Tensor:
    """Return C h for each row of h: (b or 1, r, r), (b, …, r) → (b, …, r).

    C may have (b·k, r, r) for h (b, l, …, r), which is then seen as (b·k, l / k, …, r).

    The product is computed in float32 at least, also under autocast, so that C − I is not rounded.
    (Computing B·C first would give the same result, but would turn every large product of the
    layer, and of its backward, into a batched one.)
    """
    if core.dtype == h.dtype and core.device == h.device and not is_autocast_enabled(h.device):
        return _apply(core, h)
    dtype = torch.promote_types(h.dtype, torch.float32)
    with without_autocast(h.device):
        return _apply(core.to(h.device, dtype), h.to(dtype)).to(h.dtype)


def _apply(core: Tensor, h: Tensor) -> Tensor:
    if core.shape[0] == 1:
        return F.linear(h, core[0])
    if h.dim() == 3 and h.shape[0] == core.shape[0]:
        return torch.bmm(h, core.mT)
    return torch.bmm(h.reshape(core.shape[0], -1, h.shape[-1]), core.mT).view(h.shape)


def apply_core_to_channels(core: Tensor, h: Tensor) -> Tensor:
    """Return C h if the r features are channels: (b or 1, r, r), (b, r, …) → (b, r, …)."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    with without_autocast(h.device):
        mixed = torch.matmul(core.to(h.device, dtype), h.to(dtype).flatten(2))
    return mixed.view(h.shape).to(h.dtype)


def times_core(B: Tensor, core: Tensor) -> Tensor:
    """Return K = B·C for norms and merging: (d_out, r), (b, r, r) → (b, d_out, r).

    The result is float32 at least and not part of the graph. It is computed as one plain product
    Cᵀ Bᵀ: with `matmul`, the algorithm, and so the last bits, would depend on whether B is
    trainable.
    """
    batch, rank, _ = core.shape
    B, core = B.detach(), core.detach()
    dtype = torch.promote_types(B.dtype, torch.float32)
    with without_autocast(B.device):
        rows = core.to(B.device, dtype).transpose(1, 2).reshape(batch * rank, rank)
        return (rows @ B.to(dtype).T).view(batch, rank, -1).transpose(1, 2)


def factored_row_norm(weight: Tensor, A: Tensor, K: Tensor, scaling: float) -> Tensor:
    """Return ‖W0 + s K A‖ by row, without the (b, d_out, d_in) product.

        ‖W0 + s K A‖²_row = ‖W0‖²_row + Σ_r K ⊙ (2 s P + s² K G)
        P = W0 Aᵀ (d_out, r),  G = A Aᵀ (r, r)

    This is NaRA-DoRA's norm (paper, appendix M). If s K A cancels most of W0, the precision of the
    result is that of P and ‖W0‖², so both are float32 at least.

    Args:
        weight: W0 (d_out, d_in).
        A: (r, d_in).
        K: B·C (b, d_out, r).
        scaling: s.

    Returns:
        (b, d_out), float32 at least, not part of the graph: DoRA treats the norm as a constant
        (DoRA, section 4.3).
    """
    dtype = torch.promote_types(weight.dtype, K.dtype)  # float32 or float64
    weight, A, K = weight.detach(), A.detach(), K.detach()
    with without_autocast(weight.device):
        A, K = A.to(dtype), K.to(dtype).transpose(1, 2)  # (b, r, d_out): sums run along d_out
        P, base = _of_base(weight, A)
        G = (A @ A.T).expand(K.shape[0], -1, -1)
        update = torch.bmm(G, K).mul_(scaling**2).add_(P, alpha=2 * scaling).mul_(K).sum(1)
        return update.add_(base).clamp_min_(torch.finfo(dtype).tiny).sqrt_()


def _of_base(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return Pᵀ = A W0ᵀ (r, d_out) and ‖W0‖²_row (d_out,) in the dtype of A (r, d_in).

    W0 is converted to that dtype in slices.
    """
    products, squares = [], []
    for part in weight.chunk(1 + weight.numel() // SLICE):
        part = part.to(A.dtype)
        products.append(A @ part.T)
        squares.append(torch.linalg.vector_norm(part, dim=1).square())
    return torch.cat(products, dim=1), torch.cat(squares)
