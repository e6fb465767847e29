"""A large adapted linear layer as one autograd function, which takes less time and memory than its parts.

    y = g ⊙ (W0 x + b + s B C A x) + (1 − g) ⊙ b        g: 1 (NaRA), or m / ‖W0 + s B C A‖_row (NaRA-DoRA)

It writes the update into the base layer's output, and both terms of the gradient of x into one tensor: .88 of the time
of PEFT's LoRA in training and .78 in inference, where the parts take .99 and .91; .70 and .55 of DoRA's, where they
take .74 and .68 (four layers, (4, 256, 1280), r 16, one thread, a process each; examples/benchmarks/benchmark_speed.py
has both in one). In backward, matrices with the narrow side r have it first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.modules.module import _has_any_global_hook

from nara_diffusion.cores.float32 import is_autocast_enabled, without_autocast

from .functional import apply_core

MIN_ELEMENTS = 2**17
"""Numbers in a layer's output, below which Python's share of the time is more than what fusing saves."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def can_fuse(module: Any, base_layer: Any, A: Any, B: Any, x: Tensor, result: Tensor) -> bool:
    """Whether `fused_linear` may compute PEFT's layer `module`, whose base layer has computed `result` from `x`.

    The base layer has to be a frozen W0, with no other tuner or adapter between, and no hook that sees a call. A
    compiler fuses by itself, and `vmap`, `jvp` and TorchScript know the parts alone.
    """
    if torch.compiler.is_compiling() or is_autocast_enabled(x.device):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.jit.is_tracing():  # type: ignore[reportPrivateImportUsage]
        return False
    if len(module.active_adapters) != 1 or _has_any_global_hook():
        return False
    if module._modules["base_layer"] is not base_layer or not all(
        map(_is_plain, (base_layer, A, B))
    ):
        return False
    parameters = (*base_layer._parameters.values(), A.weight, B.weight)
    return (
        B.bias is None
        and type(x) is type(result) is Tensor
        and result.is_contiguous()
        and not any(
            own is not None and own.requires_grad for own in base_layer._parameters.values()
        )
        and all(own is None or own.dtype == x.dtype == result.dtype for own in parameters)
    )


def _is_plain(layer: Any) -> bool:
    """Whether `layer` is an `nn.Linear` of parameters, whose call no hook or wrapper changes (offload, pruning)."""
    own = vars(layer)
    return (
        type(layer) is nn.Linear
        and "forward" not in own
        and type(own["_parameters"].get("weight")) is nn.Parameter
        and not any(own[hooks] for hooks in _HOOKS)
    )


def fused_linear(
    x: Tensor,
    result: Tensor,
    base_layer: Any,
    A: Tensor,
    core: Tensor,
    B: Tensor,
    scaling: float,
    gain: Any = None,
) -> Tensor:
    """g ⊙ (`result` + s B C A x) + (1 − g) ⊙ b where `can_fuse` holds; `result` is overwritten.

    Args:
        x: (b, …, d_in). result: W0 x + b (b, …, d_out). base_layer: has W0 (d_out, d_in) and b.
        A: (r, d_in). core: C (b or 1, r, r). B: (d_out, r). scaling: s. gain: g (b or 1, d_out), or None.

    Returns:
        (b, …, d_out), with gradients for x, A, core, B and gain, which have gradients in their turn.
    """
    if torch.is_grad_enabled():
        return _FusedLinear.apply(
            x, result.detach(), base_layer.weight, base_layer.bias, A, core, B, scaling, gain
        )
    _raise(result, _narrow(x, A, core)[1], B, scaling)
    return result if gain is None else _scaled(result, gain, base_layer.bias, out=result)


class _FusedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        weight: Tensor,
        bias: Any,
        A: Tensor,
        core: Tensor,
        B: Tensor,
        s: Any,
        g: Any,
    ) -> Tensor:
        h, mixed = _narrow(x, A, core)
        _raise(result, mixed, B, s)
        ctx.scaling = s
        ctx.save_for_backward(
            x, weight, bias, A, core, B, h, mixed, None if g is None else result, g
        )
        if g is not None:
            return _scaled(
                result, g, bias, out=torch.empty_like(result)
            )  # a view could not be changed in place
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, core, B, h, mixed, z, g = ctx.saved_tensors
        needs_x, needs_A, needs_core, needs_B = (ctx.needs_input_grad[i] for i in (0, 4, 5, 6))
        grad_x = grad_A = grad_core = grad_B = grad_g = None
        with without_autocast(x.device):
            if torch.is_grad_enabled():  # for second derivatives
                h, mixed = _narrow(x, A, core)
                z = F.linear(x, weight, bias) + ctx.scaling * F.linear(mixed, B).view(
                    *x.shape[:-1], -1
                )
            grad = gradients[0].reshape(-1, B.shape[0])  # (b n, d_out)
            if g is not None:
                rows = grad.view(g.shape[0], -1, g.shape[1])
                grad_g = _summed(rows * z.view(rows.shape)) - (
                    0 if bias is None else _summed(rows) * bias
                )
                grad = (rows * g[:, None]).view(grad.shape)
            grad_mixed = (
                (torch.mm(B.T, grad.T) * ctx.scaling).view(-1, *h.shape[:2]).permute(1, 2, 0)
            )  # (b, n, r)
            grad_h = apply_core(core.mT, grad_mixed).reshape(-1, A.shape[0])  # (b n, r)
            if needs_core:
                grad_core = torch.bmm(grad_mixed.to(core.dtype).mT, h.to(core.dtype))
            if needs_B:
                grad_B = (torch.mm(mixed.view(-1, B.shape[1]).T, grad) * ctx.scaling).T
            if needs_A:
                grad_A = torch.mm(grad_h.T, x.reshape(-1, x.shape[-1]))
            if needs_x:
                grad_x = torch.mm(grad, weight).addmm_(grad_h, A).view(x.shape)
        return grad_x, None, None, None, grad_A, grad_core, grad_B, None, grad_g


def _narrow(x: Tensor, A: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """h = A x and C h as (b or 1, n, r): one batch for each C."""
    h = F.linear(x, A).view(core.shape[0], -1, A.shape[0])
    return h, apply_core(core, h)


def _raise(result: Tensor, mixed: Tensor, B: Tensor, scaling: float) -> None:
    """`result` (b, …, d_out) += s B `mixed`, (b or 1, n, r)."""
    result.view(-1, B.shape[0]).addmm_(mixed.view(-1, B.shape[1]), B.T, alpha=scaling)


def _scaled(z: Tensor, gain: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """g ⊙ z + (1 − g) ⊙ b (b, …, d_out), written into `out`."""
    rows, gain = (
        z.view(gain.shape[0], -1, gain.shape[1]),
        gain[:, None],
    )  # (b or 1, n, d_out), (b or 1, 1, d_out)
    if bias is None:
        torch.mul(rows, gain, out=out.view(rows.shape))
    else:
        torch.addcmul((1 - gain) * bias, rows, gain, out=out.view(rows.shape))
    return out


def _summed(rows: Tensor) -> Tensor:
    """Σ_n (b, n, d) → (b, d), in float32 at least."""
    return rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))
