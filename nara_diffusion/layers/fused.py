"""An adapted linear layer as one autograd function, which takes less memory and time than its parts if it is large.

    y = gain ⊙ (W0 x + s B C A x)        gain: none (NaRA), or m / ‖W0 + s B C A‖_row (NaRA-DoRA)

The update is written into the base layer's output, and both shares of x's gradient into one tensor, so that of what
is large a layer keeps x alone and, for the gain's gradient, its own output. That is right only where the base layer is
a frozen W0, without another tuner between, and nobody watches its call or its output: `can_fuse` says so, and elsewhere
layers compute it from its parts.
In backward, products with a side as narrow as r have it first, (r, …), not last: on a CPU some are five times as fast.
(A model that changes the output of a NaRA-DoRA layer without bias in place gets PyTorch's error in backward.)
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

# Stands in for a gain of zero, so that backward can divide by it; float16 has no number that is as small.
TINY_GAIN = 2.0**-100
# Numbers in a layer's output, below which Python's share of the time is more than what fusing saves (benchmark_fused).
MIN_ELEMENTS = 2**17


def can_fuse(module: Any, base_layer: Any, A: Any, B: Any, x: Tensor, result: Tensor) -> bool:
    """Whether `fused_linear` may take over from PEFT's layer `module`, whose base layer has made `result` from `x`.

    It is asked at each call of each layer, hence the direct way to what PyTorch keeps.
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
    gain: Tensor | None = None,
) -> Tensor:
    """gain ⊙ (base + s B C A x), written into `base`, where `can_fuse` holds.

    Args:
        x: (b, …, d_in). base: W0 x (b, …, d_out); without gain it may hold the bias too. weight: W0 (d_out, d_in).
        A: (r, d_in). core: C (b or 1, r, r). B: (d_out, r). scaling: s.
        gain: (b or 1, d_out), of x's dtype, not float16. A gain of zero gives 2⁻¹⁰⁰ of what a gain of one would.

    Returns:
        (b, …, d_out), with gradients for x, A, core, B and gain, which have gradients in their turn.
    """
    if gain is None:
        return _FusedLinear.apply(x, base.detach(), weight, A, core, B, scaling)
    return _FusedScaledLinear.apply(x, base.detach(), weight, A, core, B, scaling, gain)


class _FusedLinear(Function):
    """`fused_linear` without gain."""

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
        of_x = of_A = of_core = of_B = None
        with _without_autocast(x):
            if torch.is_grad_enabled():  # for second derivatives
                h = _project(x, A, core)
                mixed = apply_core_to_rows(core, h)
            of_out = gradients[0].reshape(-1, B.shape[0])  # (b n, d_out)
            of_mixed = _scaled(torch.mm(B.T, of_out.T), ctx.scaling)  # (r, b n)
            of_mixed = of_mixed.view(A.shape[0], *h.shape[:2]).permute(1, 2, 0)  # (b, n, r)
            of_h = apply_core_to_rows(core.mT, of_mixed).view(-1, A.shape[0])  # (b n, r)
            if needs_core:
                of_core = _gradient_of_core(of_mixed, h, core)
            if needs_B:
                of_B = _scaled(torch.mm(mixed.view(-1, B.shape[1]).T, of_out), ctx.scaling).T
            if needs_A:
                of_A = torch.mm(of_h.T, x.reshape(-1, x.shape[-1]))
            if needs_x:
                of_x = torch.mm(of_out, weight).addmm_(of_h, A).view(x.shape)
        return of_x, None, None, of_A, of_core, of_B, None


class _FusedScaledLinear(Function):
    """`fused_linear` with gain."""

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
        gain: Tensor,
    ) -> Tensor:
        with _without_autocast(x):
            h = _project(x, A, core)
            mixed = apply_core_to_rows(core, h)
            rows = base.view(core.shape[0], -1, base.shape[-1]).mul_(_safe(gain)[:, None])
            rows.baddbmm_(mixed, _rising(B, gain), alpha=scaling)
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, weight, A, core, B, h, mixed, gain, base)
        ctx.scaling = scaling
        return base

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, A, core, B, h, mixed, gain, out = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_core, needs_B, _, _ = ctx.needs_input_grad
        of_x = of_A = of_core = of_B = None
        with _without_autocast(x):
            if torch.is_grad_enabled():  # for second derivatives
                h = _project(x, A, core)
                mixed = apply_core_to_rows(core, h)
            of_out = gradients[0].reshape(core.shape[0], -1, B.shape[0])  # (b, n, d_out)
            of_mixed = torch.bmm(_rising(B, gain), of_out.mT)  # (b, r, n)
            of_mixed = _scaled(of_mixed, ctx.scaling).mT  # (b, n, r)
            of_h = apply_core_to_rows(core.mT, of_mixed).view(-1, A.shape[0])  # (b n, r)
            if needs_core:
                of_core = _gradient_of_core(of_mixed, h, core)
            if needs_B:
                product = torch.bmm(mixed.mT, of_out)  # (b, r, d_out)
                of_B = _scaled((_safe(gain)[:, None] * product).sum(0), ctx.scaling).T
            if needs_A:
                of_A = torch.mm(of_h.T, x.reshape(-1, x.shape[-1]))
            of_base, of_gain = _gradients_of_scaling(of_out, out.view(of_out.shape), gain)
            if needs_x:
                of_x = torch.mm(of_base.reshape(-1, B.shape[0]), weight).addmm_(of_h, A).view(x.shape)
        return of_x, None, None, of_A, of_core, of_B, None, of_gain


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _project(x: Tensor, A: Tensor, core: Tensor) -> Tensor:
    """h = A x as (b or 1, n, r): one batch for each C."""
    return F.linear(x, A).view(core.shape[0], -1, A.shape[0])


def _safe(gain: Tensor) -> Tensor:
    return torch.where(gain == 0, TINY_GAIN, gain)


def _rising(B: Tensor, gain: Tensor) -> Tensor:
    """(gain ⊙ B)ᵀ: (b, r, d_out)."""
    return (_safe(gain)[..., None] * B).mT


def _is_vectorized(gradient: Tensor) -> bool:
    """Whether it stands for many gradients, into which nothing can be written: `vmap`, or `is_grads_batched=True`."""
    return torch._C._are_functorch_transforms_active() or is_legacy_batchedtensor(gradient)


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return tensor if scaling == 1.0 else scaling * tensor


def _gradient_of_core(of_mixed: Tensor, h: Tensor, core: Tensor) -> Tensor:
    """Of mixed = h Cᵀ: (b, r, r), from (b, n, r) twice."""
    if of_mixed.dtype != core.dtype:
        of_mixed, h = of_mixed.to(core.dtype), h.to(core.dtype)
    return torch.bmm(of_mixed.mT, h)


def _gradients_of_scaling(of_out: Tensor, out: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Of out = gain ⊙ z, for z (b, n, d) and gain (b, d), where Σ_n of_out ⊙ z is found from out: z is not kept.

    The products that are summed stand where the gradient of z comes after, so that there is no other large tensor.
    """
    safe = _safe(gain)
    if torch.is_grad_enabled() or _is_vectorized(of_out):
        return of_out * safe[:, None], (of_out * out).sum(1) / safe
    of_z = of_out * out
    of_gain = of_z.sum(1, dtype=torch.promote_types(safe.dtype, torch.float32)) / safe
    return torch.mul(of_out, safe[:, None], out=of_z), of_gain.to(gain.dtype)
