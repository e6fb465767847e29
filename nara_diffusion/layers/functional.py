"""Compute an adapted layer's products in plain torch.

    y = W0 x + b + s B (h + D h),   h = A x,   D = C - I
    y = g ⊙ (W0 x + s B (h + D h)) + b,   g = m / norm                         (NaRA-DoRA)

Shapes: A (r, d_in), D (n, r, r), B (d_out, r). There is one matrix for all positions, one for each
sample, or one for each of k equal consecutive parts of a sample's positions. h (b, l, r) is viewed
as (n, b l / n, r). Layers get the deviation D rather than C, because D is small. Rounding D to
bfloat16 costs no more than rounding h + D h, while rounding C would wipe out D.

The norm of NaRA-DoRA, ‖W0 + s B C A‖_row, is computed without the product B C A. There is one norm
for each of the n matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from nara_diffusion.cores.core import without_autocast


def mixed(deviation: Tensor, h: Tensor) -> Tensor:
    """Return h + D h (b, …, r), in at least float32, for D (n, r, r) and h (b, …, r).

    If D has a further column β, return h + D h + β.
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    with without_autocast(h.device):
        rows = h.to(dtype).reshape(len(deviation), -1, h.shape[-1])
        D = deviation.to(h.device, dtype)
        product = _plus(rows, D[..., : h.shape[-1]])
        if has_beta(D):
            product = product + D[..., -1:].mT
        return product.view(h.shape).to(h.dtype)


def has_beta(deviation: Tensor) -> bool:
    """Return whether D (n, r, r or r + 1) has a further column, the β of the core "film"."""
    return deviation.shape[-1] > deviation.shape[-2]


def mixed_channels(deviation: Tensor, h: Tensor) -> Tensor:
    """Return h + D h (b, r, …) for D (b or 1, r, r) and h (b, r, …) with the features as channels."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    with without_autocast(h.device):
        columns = h.to(dtype).flatten(2)
        D = deviation.to(h.device, dtype).expand(len(h), -1, -1)
        return torch.baddbmm(columns, D, columns).view(h.shape).to(h.dtype)


def _plus(h: Tensor, D: Tensor, scale: float = 1.0) -> Tensor:
    """Return `scale` (h + h Dᵀ), (n, l, r), for h (n, l, r) and D (n, r, r)."""
    if D.shape[0] == 1:  # a batched product with one matrix is slow on CPUs
        rows = h[0]
        return torch.addmm(rows, rows, D[0].T, beta=scale, alpha=scale)[None]
    return torch.baddbmm(h, h, D.mT, beta=scale, alpha=scale)


def linear_in_one(
    x: Tensor,
    result: Tensor,
    base: tuple[Tensor, Tensor | None] | None,
    A: Tensor,
    deviation: Tensor,
    operand: Tensor,
    B: Tensor,
    scaling: float,
    magnitude: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the output of an adapted linear layer, with few kernels and little memory.

    The function computes in the dtype of `result` and converts x, A and B itself. It accumulates
    both terms of the gradient of x in one tensor. In backward, matrices with a narrow side r have
    r as their first axis.

    Args:
        x: the input (b, …, d_in).
        result: the base output W0 x + b (b, …, d_out).
        base: W0 and b, if they are frozen and `result` was computed from them. `result` is then
            overwritten, and the gradient that reaches x through W0 is computed here. DoRA needs
            this. If None, the update is added to `result`.
        A: the factor (r, d_in).
        deviation: D (n, r, r), float32. Its gradient is computed in float32.
        operand: D without gradient, in the dtype used to compute h + D h; or Cᵀ (r, r), while
            gradients are off.
        B: the factor (d_out, r).
        scaling: s.
        magnitude: DoRA's magnitude m (d_out,) and norm (n, d_out); the norm gets no gradient. None
            without DoRA.

    Returns:
        The output (b, …, d_out). x, `result`, A, D, B and m get gradients, which can themselves be
        differentiated.
    """
    W, b = (None, None) if base is None else base
    m, norm = (None, None) if magnitude is None else magnitude
    if not torch.is_grad_enabled():  # an autograd function takes longer
        rows, A, B = _converted(x, A, B, result.dtype)
        z, raised = result.flatten(0, -2), _mixed_rows(F.linear(rows, A), operand, scaling)
        z = torch.addmm(z, raised, B.T, out=None if W is None else z)
        if m is not None and norm is not None:
            gain = _gain(m, norm, result.dtype)[:, None]
            z = scaled(z.view(gain.shape[0], -1, z.shape[1]), gain, b)
        elif W is not None:
            return result
        return z.view_as(result)
    if W is not None:
        result = result.detach()
    return _LinearInOne.apply(x, result, W, b, A, deviation, B, operand, scaling, m, norm)


class _LinearInOne(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        A: Tensor,
        D: Tensor,
        B: Tensor,
        operand: Tensor,
        s: float,
        m: Tensor | None,
        norm: Tensor | None,
    ) -> Tensor:
        rows, low_A, low_B = _converted(x, A, B, result.dtype)
        h, raised = _narrow(rows, low_A, operand, s)
        out = result if W is not None else torch.empty_like(result).contiguous()
        z, sums = result.reshape(-1, len(B)), out.reshape(-1, len(B))
        torch.addmm(z, raised.view(-1, len(A)), low_B.T, out=sums)
        ctx.scaling = s
        if m is None or norm is None:
            ctx.save_for_backward(x, W, b, A, D, B, low_A, low_B, operand, h, raised, *[None] * 4)
            if W is not None:
                ctx.mark_dirty(result)
            return out
        gain = _gain(m, norm, result.dtype)
        z = out.view(len(gain), -1, len(B))
        ctx.save_for_backward(x, W, b, A, D, B, low_A, low_B, operand, h, raised, z, gain, m, norm)
        scaled_out = torch.empty_like(out)  # a view could not be changed in place
        scaled(z, gain[:, None], b, out=scaled_out.view(z.shape))
        return scaled_out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b, A, D, B, low_A, low_B, operand, h, raised, z, gain, m, norm = ctx.saved_tensors
        s, dtype = ctx.scaling, h.dtype
        needs_x, needs_result, _, _, needs_A, needs_D, needs_B, _, _, needs_m, _ = (
            ctx.needs_input_grad
        )
        grad_x = grad_A = grad_D = grad_B = grad_m = None
        with without_autocast(x.device):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            if torch.is_grad_enabled():  # for second derivatives
                rows, low_A, low_B = _converted(x, A, B, dtype)
                operand = D.to(operand.device, operand.dtype)
                h, raised = _narrow(rows, low_A, operand, s)
                if m is not None:
                    z = F.linear(rows, W.to(dtype), None if b is None else b.to(dtype))
                    z = z.addmm(raised.view(-1, len(A)), low_B.T).view(len(norm), -1, len(B))
                    gain = _gain(m, norm, dtype)
            grad = gradients[0].reshape(-1, len(B))  # (b l, d_out)
            if m is not None:
                of_rows = grad.view(z.shape)
                if needs_m:
                    grad_m = _grad_of_magnitude(of_rows, z, b, norm).view(m.shape).to(m.dtype)
                grad = (of_rows * gain[:, None]).view(grad.shape)
            narrow = torch.mm(low_B.T, grad.T)  # (r, b l)
            narrow = narrow.view(len(narrow), *h.shape[:2]).permute(1, 2, 0)  # (n, l, r)
            grad_h = _plus(narrow.to(operand.dtype), operand.mT, s).to(dtype)
            grad_h = grad_h.reshape(-1, len(A))
            if needs_D:
                grad_D = _grad_of_deviation(D, narrow, h, s)
            if needs_B:
                grad_B = torch.mm(raised.view(-1, len(A)).T, grad).T
                grad_B = grad_B.to(B.dtype, memory_format=torch.contiguous_format)
            if needs_A:
                grad_A = torch.mm(grad_h.T, rows).to(A.dtype)
            if needs_x and W is None:
                grad_x = torch.mm(grad_h, low_A)
            elif needs_x:
                grad_x = torch.mm(grad, W.to(dtype)).addmm_(grad_h, low_A)
            if grad_x is not None:
                grad_x = grad_x.view(x.shape).to(x.dtype)
        grad_result = gradients[0] if needs_result else None
        return grad_x, grad_result, None, None, grad_A, grad_D, grad_B, None, None, grad_m, None


def _converted(
    x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x as rows (b l, d_in), A and B in `dtype`."""
    rows = x.flatten(0, -2)
    if x.dtype == A.dtype == B.dtype == dtype:  # three calls of `to` take longer
        return rows, A, B
    return rows.to(dtype), A.to(dtype), B.to(dtype)


def _narrow(rows: Tensor, A: Tensor, operand: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return h = A x and s (h + D h), both (n, l, r)."""
    h = torch.mm(rows, A.T).view(operand.shape[0], -1, A.shape[0])
    if operand.dtype == h.dtype:
        return h, _plus(h, operand, scale)
    with without_autocast(h.device):
        return h, _plus(h.to(operand.dtype), operand, scale).to(h.dtype)


def _mixed_rows(h: Tensor, operand: Tensor, scale: float) -> Tensor:
    """Return s C h (b l, r) in the dtype of h (b l, r), for an operand Cᵀ (r, r) or D (n, r, r)."""
    if operand.dtype != h.dtype:
        with without_autocast(h.device):
            return _mixed_rows(h.to(operand.dtype), operand, scale).to(h.dtype)
    if operand.dim() == 2:
        return torch.addmm(h, h, operand, beta=0, alpha=scale)
    return _plus(h.view(operand.shape[0], -1, h.shape[1]), operand, scale).flatten(0, 1)


def _gain(m: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return g = m / norm (n, d_out)."""
    return (m.view(1, -1) / norm).to(dtype)


def scaled(z: Tensor, gain: Tensor, b: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return g ⊙ z + (1 − g) ⊙ b; g and b are broadcast to z."""
    if b is None:
        return torch.mul(z, gain, out=out)
    dtype = torch.promote_types(z.dtype, gain.dtype)
    return torch.lerp(b.to(dtype), z.to(dtype), gain.to(dtype), out=out)


def _grad_of_magnitude(grad: Tensor, z: Tensor, b: Tensor | None, norm: Tensor) -> Tensor:
    """Return the gradient of m (d_out,), summed in at least float32."""
    dtype = norm.dtype
    total = (grad * z).sum(1, dtype=dtype)  # (n, d_out)
    if b is not None:
        total = torch.addcmul(total, grad.sum(1, dtype=dtype), b.to(dtype), value=-1)
    return (total / norm).sum(0)


def _grad_of_deviation(D: Tensor, narrow: Tensor, h: Tensor, scale: float) -> Tensor:
    """Return the gradient of D (n, r, r), computed in at least float32."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    like = D.detach().to(h.device, dtype)  # only its shape is read
    grad = torch.baddbmm(like, narrow.to(dtype).mT, h.to(dtype), beta=0, alpha=scale)
    return grad.to(D.device, D.dtype)


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
