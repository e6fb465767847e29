"""An adapted linear layer as one autograd function: large layers then take less memory and time.

    y = dora_scale ⊙ (W0 x + s B C A x)        dora_scale: none (NaRA), or m / ‖W0 + s B C A‖_row (NaRA-DoRA)

It writes the update into the base layer's output, and both terms of the gradient of x into one tensor. The only large
tensors that it keeps for backward are x and, for the gradient of dora_scale, its own output. `can_fuse` allows it where
the base layer is a frozen W0, no other tuner stands between, and no hook sees the base layer's call or output. All
other layers compute the parts one by one. In backward, matrices with the narrow side r have it first, (r, …): on a CPU
some products are five times as fast. (Changing the output of a NaRA-DoRA layer without bias in place raises PyTorch's
error in backward.)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.function import Function

from .effective_weights import GLOBAL_HOOKS, is_plain
from .functional import apply_core_to_rows

# Stands in for a dora_scale of zero, so that backward can divide by it; float16 has no number that is as small.
TINY_DORA_SCALE = 2.0**-100
# Numbers in a layer's output, below which Python's share of the time is more than what fusing saves (benchmark_fused).
MIN_ELEMENTS = 2**17


def can_fuse(module: Any, base_layer: Any, A: Any, B: Any, x: Tensor, result: Tensor) -> bool:
    """Whether `fused_linear` may compute PEFT's layer `module`; its base layer has computed `result` from `x`.

    It runs at each call of each layer, so that it reads PyTorch's private fields directly.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False  # a compiler fuses by itself; functions such as `vmap` and `jvp` have rules for the parts alone
    if torch._C._get_tracing_state() is not None:
        return False  # TorchScript cannot keep the function
    if result.numel() < MIN_ELEMENTS:
        return False
    if any(GLOBAL_HOOKS) or len(module.active_adapters) != 1:
        return False
    if module._modules["base_layer"] is not base_layer:
        return False  # another tuner has made `result`, which is more than W0 x
    if not (is_plain(base_layer) and is_plain(A) and is_plain(B)):
        return False
    weight, bias = base_layer._parameters["weight"], base_layer._parameters["bias"]
    rising, rising_bias, dtype = B._parameters["weight"], B._parameters["bias"], x.dtype
    return (
        rising_bias is None
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and result.dtype == weight.dtype == rising.dtype == A._parameters["weight"].dtype == dtype
        and type(x) is type(result) is Tensor
        and result.is_contiguous()
    )


def fused_linear(
    x: Tensor,
    base: Tensor,
    weight: Tensor,
    A: Tensor,
    core: Tensor,
    B: Tensor,
    scaling: float,
    dora_scale: Tensor | None = None,
) -> Tensor:
    """dora_scale ⊙ (base + s B C A x), written into `base`, where `can_fuse` holds.

    Args:
        x: (b, …, d_in). weight: W0 (d_out, d_in).
        base: W0 x (b, …, d_out); without dora_scale it may hold the bias too.
        A: (r, d_in). core: C (b or 1, r, r). B: (d_out, r). scaling: s.
        dora_scale: (b or 1, d_out), of x's dtype, not float16. A zero in it counts as 2⁻¹⁰⁰.

    Returns:
        (b, …, d_out), with gradients for x, A, core, B and dora_scale, which have gradients in their turn.
    """
    if dora_scale is None:
        return _FusedLinear.apply(x, base.detach(), weight, A, core, B, scaling)
    return _FusedScaledLinear.apply(x, base.detach(), weight, A, core, B, scaling, dora_scale)


class _FusedLinear(Function):
    """`fused_linear` without dora_scale."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, weight: Tensor, A: Tensor, core: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        with _without_autocast(x):
            h = _project(x, A, core)
            mixed = apply_core_to_rows(core, h)
            base.view(-1, B.shape[0]).addmm_(mixed.view(-1, A.shape[0]), B.T, alpha=scaling)
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, weight, A, core, B, h, mixed)
        ctx.scaling = scaling
        return base

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, A, core, B, h, mixed = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_core, needs_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_core = grad_B = None
        with _without_autocast(x):
            if torch.is_grad_enabled():  # for second derivatives
                h = _project(x, A, core)
                mixed = apply_core_to_rows(core, h)
            grad_out = gradients[0].reshape(-1, B.shape[0])  # (b n, d_out)
            grad_mixed = _scaled(torch.mm(B.T, grad_out.T), ctx.scaling)  # (r, b n)
            grad_mixed = grad_mixed.view(A.shape[0], *h.shape[:2]).permute(1, 2, 0)  # (b, n, r)
            grad_h = apply_core_to_rows(core.mT, grad_mixed).view(-1, A.shape[0])  # (b n, r)
            if needs_core:
                grad_core = _gradient_of_core(grad_mixed, h, core)
            if needs_B:
                grad_B = _scaled(torch.mm(mixed.view(-1, B.shape[1]).T, grad_out), ctx.scaling).T
            if needs_A:
                grad_A = torch.mm(grad_h.T, x.reshape(-1, x.shape[-1]))
            if needs_x:
                grad_x = torch.mm(grad_out, weight).addmm_(grad_h, A).view(x.shape)
        return grad_x, None, None, grad_A, grad_core, grad_B, None


class _FusedScaledLinear(Function):
    """`fused_linear` with dora_scale."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        weight: Tensor,
        A: Tensor,
        core: Tensor,
        B: Tensor,
        scaling: float,
        dora_scale: Tensor,
    ) -> Tensor:
        with _without_autocast(x):
            h = _project(x, A, core)
            mixed = apply_core_to_rows(core, h)
            rows = base.view(core.shape[0], -1, base.shape[-1]).mul_(_safe(dora_scale)[:, None])
            rows.baddbmm_(mixed, _rising(B, dora_scale), alpha=scaling)
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, weight, A, core, B, h, mixed, dora_scale, base)
        ctx.scaling = scaling
        return base

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, A, core, B, h, mixed, dora_scale, out = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_core, needs_B, _, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_core = grad_B = None
        with _without_autocast(x):
            if torch.is_grad_enabled():  # for second derivatives
                h = _project(x, A, core)
                mixed = apply_core_to_rows(core, h)
            grad_out = gradients[0].reshape(core.shape[0], -1, B.shape[0])  # (b, n, d_out)
            grad_mixed = torch.bmm(_rising(B, dora_scale), grad_out.mT)  # (b, r, n)
            grad_mixed = _scaled(grad_mixed, ctx.scaling).mT  # (b, n, r)
            grad_h = apply_core_to_rows(core.mT, grad_mixed).view(-1, A.shape[0])  # (b n, r)
            if needs_core:
                grad_core = _gradient_of_core(grad_mixed, h, core)
            if needs_B:
                product = torch.bmm(mixed.mT, grad_out)  # (b, r, d_out)
                grad_B = _scaled((_safe(dora_scale)[:, None] * product).sum(0), ctx.scaling).T
            if needs_A:
                grad_A = torch.mm(grad_h.T, x.reshape(-1, x.shape[-1]))
            grad_base, grad_dora_scale = _gradients_of_scaling(grad_out, out.view(grad_out.shape), dora_scale)
            if needs_x:
                grad_x = torch.mm(grad_base.reshape(-1, B.shape[0]), weight).addmm_(grad_h, A).view(x.shape)
        return grad_x, None, None, grad_A, grad_core, grad_B, None, grad_dora_scale


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _project(x: Tensor, A: Tensor, core: Tensor) -> Tensor:
    """h = A x as (b or 1, n, r): one batch for each C."""
    return F.linear(x, A).view(core.shape[0], -1, A.shape[0])


def _safe(dora_scale: Tensor) -> Tensor:
    return torch.where(dora_scale == 0, TINY_DORA_SCALE, dora_scale)


def _rising(B: Tensor, dora_scale: Tensor) -> Tensor:
    """(dora_scale ⊙ B)ᵀ: (b, r, d_out)."""
    return (_safe(dora_scale)[..., None] * B).mT


def _is_vectorized(gradient: Tensor) -> bool:
    """Whether `gradient` is a batch of gradients (`vmap`, `is_grads_batched=True`): in-place writes would fail."""
    return torch._C._are_functorch_transforms_active() or is_legacy_batchedtensor(gradient)


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return tensor if scaling == 1.0 else scaling * tensor


def _gradient_of_core(grad_mixed: Tensor, h: Tensor, core: Tensor) -> Tensor:
    """Of mixed = h Cᵀ: (b, r, r), from (b, n, r) twice."""
    if grad_mixed.dtype != core.dtype:
        grad_mixed, h = grad_mixed.to(core.dtype), h.to(core.dtype)
    return torch.bmm(grad_mixed.mT, h)


def _gradients_of_scaling(grad_out: Tensor, out: Tensor, dora_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of out = dora_scale ⊙ z, z (b, n, d), dora_scale (b, d). Σ_n grad_out ⊙ z comes from out, so z is not kept.

    The products are written where the gradient of z is written afterwards, so that there is one large tensor only.
    """
    safe = _safe(dora_scale)
    if torch.is_grad_enabled() or _is_vectorized(grad_out):
        return grad_out * safe[:, None], (grad_out * out).sum(1) / safe
    grad_z = grad_out * out
    grad_dora_scale = grad_z.sum(1, dtype=torch.promote_types(safe.dtype, torch.float32)) / safe
    return torch.mul(grad_out, safe[:, None], out=grad_z), grad_dora_scale.to(dora_scale.dtype)
