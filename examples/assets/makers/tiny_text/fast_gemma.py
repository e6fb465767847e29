"""A training step of gemma-tiny in a sixth less time, with the same losses and gradients up to rounding.

    fast_norms(model)     each RMS norm as one autograd function, y = x / √(mean x² + ε) · w
    encoding_once(model)  one run of the encoder for both passes of self-conditioning

Both are for a bare float32 model: a wrapper such as DDP would write to its buffers between the two passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaRMSNorm


class _Norm(torch.autograd.Function):
    """x (…, d) → n = x / √(mean x² + ε); the gradient is (g − n · mean(g · n)) / √(mean x² + ε)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (size.square_() / x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (normed, scale) = grads, ctx.saved_tensors
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / -normed.shape[-1]
        return torch.addcmul(grad, normed, along).mul_(scale), None


def _forward(norm: DiffusionGemmaRMSNorm, x: Tensor) -> Tensor:
    attributes = vars(norm)
    eps = attributes.get("variance_epsilon", attributes.get("eps"))  # its name from transformers 5.25 on, and before
    normed = _Norm.apply(x, eps)
    return normed * norm.weight if norm.with_scale else normed


def fast_norms(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Give each norm of a float32 model the function above."""
    for module in model.modules():
        if isinstance(module, DiffusionGemmaRMSNorm):
            module.forward = partial(_forward, module)


@contextmanager
def encoding_once(model: DiffusionGemmaForBlockDiffusion) -> Iterator[None]:
    """Inside, the encoder runs at its first call, and later calls get the same keys and output.

    Its run has a gradient if this context does, even inside the first pass, which has none.
    """
    encoder, outputs, learns = model.model.encoder, [], torch.is_grad_enabled()
    read = encoder.forward

    def reading(**given: Any) -> Any:
        if not outputs:
            with torch.set_grad_enabled(learns):
                outputs.append(read(**given))
        given["cache"].layers = outputs[0].cache.layers
        return outputs[0]

    encoder.forward = reading
    try:
        yield
    finally:
        del encoder.forward
