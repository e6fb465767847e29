"""A large adapted linear layer as one autograd function, which saves time and memory.

    y = g ⊙ (W0 x + b + s B C A x) + (1 − g) ⊙ b

g is 1 (NaRA), or m / ‖W0 + s B C A‖_row (NaRA-DoRA). The function writes the update into the base
layer's output, and both terms of the gradient of x into one tensor. In backward, matrices with a
narrow side r have it as their first axis. Time of a step, relative to PEFT's:

                   NaRA / LoRA            NaRA-DoRA / DoRA
                   training  inference    training  inference
    one function       0.88       0.78        0.70       0.55
    its parts          0.99       0.91        0.74       0.68

These times are from four layers, (4, 256, 1280), r 16, one thread, with one process for each
measurement. examples/benchmarks/benchmark_speed.py runs both in one process.
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

from .adapted_layer import AdaptedLayer
from .functional import apply_core

MIN_ELEMENTS = 2**17
"""Elements of a layer's output. Below this, one function saves less time than its Python costs."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def runs_in_one(
    layer: AdaptedLayer,
    base_layer: nn.Linear,
    A: nn.Linear,
    B: nn.Linear,
    x: Tensor,
    result: Tensor,
) -> bool:
    """Return whether `linear_in_one` may compute `layer`.

    The base layer made `result` from `x`. It has to be a frozen W0, without another tuner or
    adapter in between, and no hook may observe a call. A compiler fuses the parts itself. `vmap`,
    `jvp` and TorchScript need the parts.
    """
    if torch.compiler.is_compiling() or is_autocast_enabled(x.device):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.jit.is_tracing():  # type: ignore[reportPrivateImportUsage]
        return False
    if len(layer.active_adapters) != 1 or _has_any_global_hook():
        return False
    if layer._modules["base_layer"] is not base_layer:
        return False
    if not (_is_plain(base_layer) and _is_plain(A) and _is_plain(B)) or B.bias is not None:
        return False
    if not (type(x) is type(result) is Tensor and result.is_contiguous()):
        return False
    for own in base_layer._parameters.values():
        if own is not None and (own.requires_grad or not own.dtype == x.dtype == result.dtype):
            return False
    return A.weight.dtype == B.weight.dtype == x.dtype == result.dtype


def _is_plain(layer: nn.Module) -> bool:
    """Return whether `layer` is an `nn.Linear` that no hook or wrapper changes.

    Offloading and pruning are such wrappers.
    """
    own = vars(layer)
    return (
        type(layer) is nn.Linear
        and "forward" not in own
        and type(own["_parameters"].get("weight")) is nn.Parameter
        and not any(own[hooks] for hooks in _HOOKS)
    )


def linear_in_one(
    x: Tensor,
    result: Tensor,
    base_layer: nn.Linear,
    A: Tensor,
    core: Tensor,
    B: Tensor,
    scaling: float,
    gain: Tensor | None = None,
) -> Tensor:
    """Return g ⊙ (`result` + s B C A x) + (1 − g) ⊙ b if `runs_in_one`; `result` is overwritten.

    Args:
        x: (b, …, d_in).
        result: W0 x + b (b, …, d_out).
        base_layer: has W0 (d_out, d_in) and b.
        A: (r, d_in).
        core: C (b or 1, r, r).
        B: (d_out, r).
        scaling: s.
        gain: g (b or 1, d_out), or None.

    Returns:
        (b, …, d_out). x, A, core, B and gain get gradients, and these can be differentiated again.
    """
    if torch.is_grad_enabled():
        weight, bias = base_layer.weight, base_layer.bias
        return _LinearInOne.apply(x, result.detach(), weight, bias, A, core, B, scaling, gain)
    _raise(result, _narrow(x, A, core)[1], B, scaling)
    return result if gain is None else _scaled(result, gain, base_layer.bias, out=result)


class _LinearInOne(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        core: Tensor,
        B: Tensor,
        s: float,
        g: Tensor | None,
    ) -> Tensor:
        h, mixed = _narrow(x, A, core)
        _raise(result, mixed, B, s)
        ctx.scaling = s
        z = None if g is None else result
        ctx.save_for_backward(x, weight, bias, A, core, B, h, mixed, z, g)
        if g is not None:
            # a view could not be changed in place
            return _scaled(result, g, bias, out=torch.empty_like(result))
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
                update = F.linear(mixed, B).view(*x.shape[:-1], -1)
                z = F.linear(x, weight, bias) + ctx.scaling * update
            grad = gradients[0].reshape(-1, B.shape[0])  # (b n, d_out)
            if g is not None:
                rows = grad.view(g.shape[0], -1, g.shape[1])
                grad_g = _summed(rows * z.view(rows.shape))
                if bias is not None:
                    grad_g = grad_g - _summed(rows) * bias
                grad = (rows * g[:, None]).view(grad.shape)
            narrow = torch.mm(B.T, grad.T) * ctx.scaling  # (r, b n)
            grad_mixed = narrow.view(-1, *h.shape[:2]).permute(1, 2, 0)  # (b, n, r)
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
    """Return h = A x and C h as (b or 1, n, r), with one batch entry for each C."""
    h = F.linear(x, A).view(core.shape[0], -1, A.shape[0])
    return h, apply_core(core, h)


def _raise(result: Tensor, mixed: Tensor, B: Tensor, scaling: float) -> None:
    """Add s B `mixed` (b or 1, n, r) to `result` (b, …, d_out) in place."""
    result.view(-1, B.shape[0]).addmm_(mixed.view(-1, B.shape[1]), B.T, alpha=scaling)


def _scaled(z: Tensor, gain: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write g ⊙ z + (1 − g) ⊙ b (b, …, d_out) into `out`."""
    rows = z.view(gain.shape[0], -1, gain.shape[1])  # (b or 1, n, d_out)
    gain = gain[:, None]  # (b or 1, 1, d_out)
    if bias is None:
        torch.mul(rows, gain, out=out.view(rows.shape))
    else:
        torch.addcmul((1 - gain) * bias, rows, gain, out=out.view(rows.shape))
    return out


def _summed(rows: Tensor) -> Tensor:
    """Return Σ_n (b, n, d) → (b, d), in float32 at least."""
    return rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))
