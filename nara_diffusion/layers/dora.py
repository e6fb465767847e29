"""NaRA-DoRA's LoRA variants on linear layers (quantised or not) and convolutions.

    y = g ⊙ (W0 x + s B C A x) + b,   g = m / ‖W0 + s B C A‖_row        (paper, appendix M; the norm is a constant)

The letters are those of `variants`; g is (b or 1, d_out).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import transpose
from torch import Tensor

from . import fused
from .functional import apply_core, apply_core_to_channels, factored_row_norm, times_core
from .fused import can_fuse, fused_linear
from .matrices import CONVOLUTIONS, base_matrix
from .offloading import is_managed, onloaded
from .variants import NaraVariant, is_dropout_free


class NaraDoraLinear(NaraVariant):
    """y = g ⊙ (W0 x + s B C A x) + b, the norm from its factors.

    With dropout, the dropped input is also used for the base product that the magnitude scales, as in PEFT.
    """

    def update(self, module: Any, active_adapter: str, x: Tensor, result: Tensor) -> Tensor:
        A, B, base_layer = (
            module.lora_A[active_adapter],
            module.lora_B[active_adapter],
            module.get_base_layer(),
        )
        read = (A, B, base_layer, module.lora_magnitude_vector[active_adapter])
        if not any(map(is_managed, read)):
            return self._update(module, active_adapter, x, result, *read)
        with onloaded(*read):  # whose weights are read for the norm
            return self._update(module, active_adapter, x, result, *read)

    def _update(
        self,
        module: Any,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        A: Any,
        B: Any,
        base_layer: Any,
        m: Any,
    ) -> Tensor:
        core, scaling = self.batch_core(module.r[active_adapter], x), module.scaling[active_adapter]
        weight, A_weight, B_weight = base_matrix(module), A.weight, B.weight
        K = times_core(B_weight.detach().flatten(1), core)
        norm = factored_row_norm(weight, A_weight.detach().flatten(1), K, scaling)
        gain = (m.weight.view(1, -1) / norm).to(x.dtype)  # (b or 1, d_out)
        dropout_free = is_dropout_free(module, active_adapter)
        if (
            dropout_free
            and result.numel() >= fused.MIN_ELEMENTS
            and can_fuse(module, base_layer, A, B, x, result)
        ):
            return fused_linear(x, result, base_layer, A_weight, core, B_weight, scaling, gain)
        gain, bias = self._aligned(gain, result), base_layer.bias
        bias = None if bias is None else self._aligned(bias[None], result)
        if dropout_free:
            z = torch.add(result, self._rise(core, A, B, x), alpha=scaling)  # W0 x + b + s B C A x
            return z * gain if bias is None else torch.addcmul((1 - gain) * bias, z, gain)
        dropped = module.lora_dropout[active_adapter](x)
        base = self._base(base_layer, weight, dropped)
        return result + (gain - 1) * base + scaling * gain * self._rise(core, A, B, dropped)

    def _rise(self, core: Tensor, A: Any, B: Any, x: Tensor) -> Tensor:
        """B C A x (b, …, d_out)."""
        return B(apply_core(core, A(x)))

    def _base(self, base_layer: Any, weight: Tensor, x: Tensor) -> Tensor:
        """W0 x (b, …, d_out)."""
        return F.linear(x, weight.to(x.dtype))

    def _aligned(self, rows: Tensor, result: Tensor) -> Tensor:
        """(b or 1, d_out) in the axes of `result` (b, …, d_out)."""
        return rows.view(rows.shape[0], *(1,) * (result.dim() - 2), rows.shape[1])

    def merge_factor(self, module: Any, active_adapter: str, A: Tensor, K: Tensor) -> Tensor:
        with module._unmerged_base_weight(safe_merge=True) as weight:
            matrix = transpose(weight, getattr(module, "fan_in_fan_out", False)).flatten(1)
            norm = factored_row_norm(matrix, A, K, module.scaling[active_adapter])[0]
        factor = module.lora_magnitude_vector[active_adapter].weight.detach().flatten() / norm
        if isinstance(module, CONVOLUTIONS):
            return factor.view(-1, *(1,) * (module._kernel_dim - 1))
        return transpose(factor[:, None], getattr(module, "fan_in_fan_out", False))


class NaraDoraConv(NaraDoraLinear):
    """NaRA-DoRA on a convolution: rows are output channels, over input channels and kernel."""

    is_conv = True

    def _rise(self, core: Tensor, A: Any, B: Any, x: Tensor) -> Tensor:
        return B(apply_core_to_channels(core, A(x)))

    def _base(self, base_layer: Any, weight: Tensor, x: Tensor) -> Tensor:
        return base_layer._conv_forward(x, base_layer.weight, None)

    def _aligned(self, rows: Tensor, result: Tensor) -> Tensor:
        """(b or 1, d_out) in the axes of `result` (b, d_out, …)."""
        return rows.view(*rows.shape, *(1,) * (result.dim() - 2))
