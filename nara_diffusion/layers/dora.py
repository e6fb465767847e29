"""NaRA-DoRA's LoRA variants on linear layers (quantised or not) and convolutions.

    y = g ⊙ (W0 x + s B C A x) + b,   g = m / ‖W0 + s B C A‖_row        (paper, appendix M)

The norm is a constant: it gets no gradient. Letters are as in `variants`; g is (b or 1, d_out).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.utils.other import transpose
from torch import Tensor, nn

from . import one_function
from .adapted_layer import CONVOLUTIONS, AdaptedLayer, base_matrix
from .functional import apply_core, apply_core_to_channels, factored_row_norm, times_core
from .offloading import is_managed, onloaded
from .one_function import linear_in_one, runs_in_one
from .variants import NaraVariant, is_dropout_free


class NaraDoraLinear(NaraVariant):
    """y = g ⊙ (W0 x + s B C A x) + b, with the norm computed from its factors.

    With dropout, the base product that the magnitude scales also uses the dropped-out input, as in
    PEFT.
    """

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        base_layer = module.get_base_layer()
        magnitude = module.lora_magnitude_vector[active_adapter]
        read = (A, B, base_layer, magnitude)
        if not any(map(is_managed, read)):
            return self._update(module, active_adapter, x, result, *read)
        with onloaded(*read):  # the norm reads their weights
            return self._update(module, active_adapter, x, result, *read)

    def _update(
        self,
        module: AdaptedLayer,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        A: nn.Linear,
        B: nn.Linear,
        base_layer: nn.Linear,
        magnitude: nn.Linear,
    ) -> Tensor:
        core = self.batch_core(module.r[active_adapter], x)
        shape = result.shape
        if core.shape[0] not in (1, shape[0]):  # of parts: see (b, l, …) as (b·k, l / k, …)
            x = x.reshape(core.shape[0], -1, x.shape[-1])
            result = result.reshape(core.shape[0], -1, shape[-1])
        y = self._scaled_sum(module, active_adapter, core, x, result, A, B, base_layer, magnitude)
        return y.view(shape)

    def _scaled_sum(
        self,
        module: AdaptedLayer,
        active_adapter: str,
        core: Tensor,
        x: Tensor,
        result: Tensor,
        A: nn.Linear,
        B: nn.Linear,
        base_layer: nn.Linear,
        magnitude: nn.Linear,
    ) -> Tensor:
        """Return y for x (b, …) and C (b or 1, r, r)."""
        scaling = module.scaling[active_adapter]
        weight = base_matrix(module)
        K = times_core(B.weight.detach().flatten(1), core)
        norm = factored_row_norm(weight, A.weight.detach().flatten(1), K, scaling)
        gain = (magnitude.weight.view(1, -1) / norm).to(x.dtype)  # (b or 1, d_out)
        is_large = result.numel() >= one_function.MIN_ELEMENTS
        if not is_dropout_free(module, active_adapter):
            dropped = module.lora_dropout[active_adapter](x)
            gain = self._aligned(gain, result)
            base = self._base(base_layer, weight, dropped)
            rise = self._rise(core, A, B, dropped)
            return result + (gain - 1) * base + scaling * gain * rise
        if is_large and runs_in_one(module, base_layer, A, B, x, result):
            return linear_in_one(x, result, base_layer, A.weight, core, B.weight, scaling, gain)
        gain = self._aligned(gain, result)
        z = torch.add(result, self._rise(core, A, B, x), alpha=scaling)  # W0 x + b + s B C A x
        if base_layer.bias is None:
            return z * gain
        bias = self._aligned(base_layer.bias[None], result)
        return torch.addcmul((1 - gain) * bias, z, gain)

    def _rise(self, core: Tensor, A: nn.Linear, B: nn.Linear, x: Tensor) -> Tensor:
        """Return B C A x (b, …, d_out)."""
        return B(apply_core(core, A(x)))

    def _base(self, base_layer: nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
        """Return W0 x (b, …, d_out)."""
        return F.linear(x, weight.to(x.dtype))

    def _aligned(self, rows: Tensor, result: Tensor) -> Tensor:
        """Return `rows` (b or 1, d_out) in the axes of `result` (b, …, d_out)."""
        return rows.view(rows.shape[0], *(1,) * (result.dim() - 2), rows.shape[1])

    def merge_factor(
        self, module: AdaptedLayer, active_adapter: str, A: Tensor, K: Tensor
    ) -> Tensor:
        is_transposed = getattr(module, "fan_in_fan_out", False)
        with module._unmerged_base_weight(safe_merge=True) as weight:
            matrix = transpose(weight, is_transposed).flatten(1)
            norm = factored_row_norm(matrix, A, K, module.scaling[active_adapter])[0]
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude.detach().flatten() / norm
        if isinstance(module, CONVOLUTIONS):
            return factor.view(-1, *(1,) * (module._kernel_dim - 1))
        return transpose(factor[:, None], is_transposed)


class NaraDoraConv(NaraDoraLinear):
    """NaRA-DoRA on a convolution: a row is an output channel, over input channels and kernel."""

    is_conv = True

    def _rise(self, core: Tensor, A: nn.Linear, B: nn.Linear, x: Tensor) -> Tensor:
        return B(apply_core_to_channels(core, A(x)))

    def _base(self, base_layer: nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
        return base_layer._conv_forward(x, base_layer.weight, None)  # type: ignore[operator]

    def _aligned(self, rows: Tensor, result: Tensor) -> Tensor:
        """Return `rows` (b or 1, d_out) in the axes of `result` (b, d_out, …)."""
        return rows.view(*rows.shape, *(1,) * (result.dim() - 2))
