"""An orthogonal T-LoRA, from which its start is subtracted, as pairs of directions.

    ΔW(λ) = s Σ_{i < r(λ)} D_i,      D_i = p_i λ_i q_iᵀ − p⁰_i λ⁰_i q⁰_iᵀ = b_2i a_2iᵀ + b_2i+1 a_2i+1ᵀ

p⁰, λ⁰, q⁰ are the values at the start of training. The two terms of D_i are large and nearly cancel, so in half
precision their difference would be lost to rounding. So A and B are made of the singular vectors of D_i itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masked import Factors


@dataclass(frozen=True)
class Singular:
    """P diag(λ) Q, float64: P (d_out, r), λ (r,), Q (r, d_in)."""

    P: Tensor
    lam: Tensor
    Q: Tensor


def singular(P: Tensor, lam: Tensor, Q: Tensor, where: str) -> Singular:
    """The factors of tensors in a file: matrices or 1 × 1 kernels, and λ (1, r).

    Raises:
        ValueError: they have no rank in common.
    """
    P, lam, Q = P.double().flatten(1), lam.double().flatten(), Q.double().flatten(1)
    if not P.shape[1] == len(lam) == len(Q):
        raise ValueError(
            f"{where} has p_layer {tuple(P.shape)}, lambda_layer {tuple(lam.shape)} and q_layer {tuple(Q.shape)}, "
            "which have no rank in common: damaged."
        )
    return Singular(P, lam, Q)


def pair_factors(now: Singular, start: Singular) -> Factors:
    """A (2 r, d_in) and B (d_out, 2 r), float32, of now − start."""
    left = torch.stack([now.P * now.lam, -start.P * start.lam], dim=2).transpose(0, 1)  # (r, d_out, 2)
    right = torch.stack([now.Q, start.Q], dim=2)  # (r, d_in, 2)
    left_q, left_r = torch.linalg.qr(left)
    right_q, right_r = torch.linalg.qr(right)
    U, S, Vh = torch.linalg.svd(left_r @ right_r.transpose(1, 2))  # (r, 2, 2)
    root = S.sqrt()
    B = left_q @ (U * root[:, None, :])  # (r, d_out, 2)
    A = (root[:, :, None] * Vh) @ right_q.transpose(1, 2)  # (r, 2, d_in)
    return A.reshape(-1, A.shape[2]).float(), B.transpose(0, 1).reshape(B.shape[1], -1).float()
