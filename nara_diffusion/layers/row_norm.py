"""Compute the norm ‖W0 + s B C A‖_row of NaRA-DoRA in plain torch, without the product B C A.

Shapes: W0 (d_out, d_in), A (r, d_in), D = C − I (n, r, r), B (d_out, r). There is one norm for each
of the n matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nara_diffusion.cores.core import without_autocast

SLICE = 2**22
"""Elements of W0 converted to float32 at once for DoRA's norm: 16 MiB, which may fit the cache."""
DEVICE_SLICE = 2**26
"""The same on other devices than the CPU, where each slice launches more kernels."""


def times_core(B: Tensor, deviation: Tensor) -> Tensor:
    """Return K = B C = B + B D (n, d_out, r), for norms and merging, from B (d_out, r) and D.

    The result is in at least float32 and is detached. Its memory layout is (n, r, d_out). Film's β,
    if D has it, does not count.
    """
    dtype = torch.promote_types(B.dtype, torch.float32)
    with without_autocast(B.device):
        D = deviation.detach()[..., : B.shape[1]].to(B.device, dtype)
        columns = B.detach().to(dtype).T.expand(len(D), -1, -1)  # (n, r, d_out)
        return torch.baddbmm(columns, D.mT, columns).mT


def row_norm(weight: Tensor, A: Tensor, K: Tensor, scaling: float) -> Tensor:
    """Return the norm of each row of W0 + s K A, without the (n, d_out, d_in) product.

        ‖W0 + s K A‖²_row = ‖W0‖²_row + Σ_r K ⊙ (2 s P + s² K G),    P = W0 Aᵀ,   G = A Aᵀ

    This is NaRA-DoRA's norm (paper, appendix M). If s K A cancels most of W0, the precision of the
    result is that of P and ‖W0‖², so both are in at least float32. W0 is converted in slices.

    Args:
        weight: W0 (d_out, d_in).
        A: the factor (r, d_in).
        K: B C (n, d_out, r).
        scaling: s.

    Returns:
        The norms (n, d_out), in at least float32. They are detached, because DoRA treats the norm
        as a constant (DoRA, section 4.3).
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    size = SLICE if weight.is_cpu else DEVICE_SLICE
    products, squares = [], []
    with without_autocast(weight.device):
        A, K = A.detach().to(dtype), K.detach().to(dtype).mT  # K (n, r, d_out)
        for part in weight.detach().chunk(1 + weight.numel() // size):
            part = part.to(dtype)
            products.append(A @ part.T)
            squares.append(torch.linalg.vector_norm(part, dim=1).square())
        is_whole = len(products) == 1
        P = products[0] if is_whole else torch.cat(products, dim=1)  # Pᵀ (r, d_out)
        square = squares[0] if is_whole else torch.cat(squares)  # (d_out,)
        P, G = P.expand(len(K), -1, -1), (A @ A.T).expand(len(K), -1, -1)
        slope = torch.baddbmm(P, G, K, beta=2 * scaling, alpha=scaling**2)
        square = slope.mul_(K).sum(1).add_(square)
        return square.clamp_min_(torch.finfo(dtype).tiny).sqrt_()
