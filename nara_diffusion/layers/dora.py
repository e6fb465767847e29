"""NaRA-DoRA's LoRA variants on linear layers (quantised or not) and convolutions.

    y = m / ‖W0 + s B C A‖_row ⊙ (W0 x + s B C A x) + b        (paper, appendix M; the norm is a constant)

The letters are those of `variants`; `dora_scale` is m / ‖W0 + s B C A‖_row (b or 1, d_out).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import _ConvNd
from peft.utils.other import transpose
from torch import Tensor, nn

from .effective_weights import base_matrix, factors, may_read
from .functional import add_scaled_product, apply_core, factored_row_norm, times_core
from .fused import can_fuse, fused_linear
from .variants import NaraVariant, conv_update, is_dropout_free


class NaraDoraLinear(NaraVariant):
    """y = m / ‖W0 + s K A‖ ⊙ (W0 x + s K A x) + b, the norm from its factors.

    With dropout, the dropped input is also used for the base product that the magnitude scales, as in PEFT.
    """

    def reads(self, module: Any, active_adapter: str) -> tuple[nn.Module, ...]:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        return A, B, module.get_base_layer(), module.lora_magnitude_vector[active_adapter]

    def dora_scale(self, module: Any, active_adapter: str, weight: Tensor, core: Tensor) -> Tensor:
        """m / ‖W0 + s B C A‖ for W0 (d_out, k) and C (b or 1, r, r): (b or 1, d_out)."""
        A, B = factors(module, active_adapter)
        norm = factored_row_norm(weight, A, times_core(B, core), module.scaling[active_adapter])
        return module.lora_magnitude_vector[active_adapter].weight.view(1, -1) / norm

    def update(self, module: Any, active_adapter: str, x: Tensor, result: Tensor) -> Tensor:
        A, B, base_layer = module.lora_A[active_adapter], module.lora_B[active_adapter], module.get_base_layer()
        scaling = module.scaling[active_adapter]
        core = self.batch_core(module.r[active_adapter], x)
        weight = base_matrix(module)
        dora_scale = self.dora_scale(module, active_adapter, weight, core).to(x.dtype)  # (b or 1, d_out)
        bias = base_layer.bias
        if is_dropout_free(module, active_adapter):
            base = result if bias is None else result - bias
            if x.dtype == dora_scale.dtype != torch.float16 and can_fuse(module, base_layer, A, B, x, result):
                result = fused_linear(x, base, weight, A.weight, core, B.weight, scaling, dora_scale)
            else:
                result = _add_and_scale(base, apply_core(core, A(x)), B, dora_scale, scaling)
            return result if bias is None else result + bias
        dropped = module.lora_dropout[active_adapter](x)
        base = F.linear(dropped, weight.to(dropped.dtype))
        return result - base + _add_and_scale(base, apply_core(core, A(dropped)), B, dora_scale, scaling)

    def merge_factor(self, module: Any, active_adapter: str, A: Tensor, K: Tensor) -> Tensor:
        with module._unmerged_base_weight(safe_merge=True) as weight:
            matrix = transpose(weight, getattr(module, "fan_in_fan_out", False)).flatten(1)
            norm = factored_row_norm(matrix, A, K, module.scaling[active_adapter])[0]
        factor = module.lora_magnitude_vector[active_adapter].weight.detach().flatten() / norm
        if isinstance(module, _ConvNd):
            return factor.view(-1, *(1,) * (module._kernel_dim - 1))
        return transpose(factor[:, None], getattr(module, "fan_in_fan_out", False))


class NaraDoraConv(NaraDoraLinear):
    """NaRA-DoRA on a convolution: rows are output channels, over input channels and kernel."""

    def batched_dims(self, module: Any) -> int:
        return module._kernel_dim

    def update(self, module: Any, active_adapter: str, x: Tensor, result: Tensor) -> Tensor:
        base_layer = module.get_base_layer()
        axes = (1,) * (result.dim() - 2)
        core = self.batch_core(module.r[active_adapter], x)
        scaling = module.scaling[active_adapter]
        dora_scale = self.dora_scale(module, active_adapter, base_matrix(module), core).to(x.dtype)
        dora_scale = dora_scale.view(*dora_scale.shape, *axes)  # (b or 1, d_out, 1, …)
        dropped = module.lora_dropout[active_adapter](x)
        if is_dropout_free(module, active_adapter):
            base = result if base_layer.bias is None else result - base_layer.bias.view(1, -1, *axes)
        else:
            base = base_layer._conv_forward(dropped, base_layer.weight, None)
        return (
            result + (dora_scale - 1) * base + dora_scale * scaling * conv_update(module, active_adapter, dropped, core)
        )


def _add_and_scale(base: Tensor, h: Tensor, B: Any, dora_scale: Tensor, scaling: float) -> Tensor:
    """dora_scale ⊙ (base + s B(h)): base (b, …, d_out), h (b, …, r), dora_scale (b or 1, d_out)."""
    if not base.is_nested and may_read(B):
        return add_scaled_product(base, h, B.weight, dora_scale, scaling)
    rows = dora_scale.view(dora_scale.shape[0], *(1,) * (base.dim() - 2), dora_scale.shape[1])  # (b or 1, 1, …, d_out)
    if base.is_nested:  # a gradient can be summed over the ragged axis, but not over that and another one
        rows = rows.expand(-1, 1, *base.shape[2:])
    return rows * (base + scaling * B(h))
