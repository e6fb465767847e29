"""Factor update matrices into shared B and A and one core each (theorem 4.1 of the paper)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
