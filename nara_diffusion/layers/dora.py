"""Apply NaRA-DoRA to linear layers (quantised or not) and convolutions.

    y = g ⊙ (W0 x + s B C A x) + b,   g = m / ‖W0 + s B C A‖_row        (paper, appendix M)

The norm is treated as a constant and gets no gradient. Letters are as in `variants`; g is
(n, d_out).

W0 Aᵀ, A Aᵀ and ‖W0‖ do not depend on λ, but they are not cached between forwards. PEFT merges
another adapter of the layer by writing to `weight.data` in place, and hot-swaps A in the same way.
Neither a tensor's version nor its storage shows such a write, and it may happen between forwards.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraLinearVariant,
)
from peft.utils.other import transpose
from torch import Tensor, nn

from .adapted_layer import CONVOLUTIONS, AdaptedLayer, base_matrix
from .functional import (
    has_beta,
    linear_in_one,
    row_norm,
    scaled,
    times_core,
)
from .offloading import is_managed, onloaded
from .variants import NaraVariant, fits_one_function, frozen_base, is_dropout_free

PEFT_DORA = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
"""PEFT's LoRA variants for DoRA on linear layers and convolutions."""


class NaraDoraLinear(NaraVariant):
    """Compute y = g ⊙ (W0 x + s B C A x) + b, with the norm computed from the factors.

    If there is dropout, the base product W0 x also uses the input after dropout, as in PEFT.
    """

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        base_layer = module.get_base_layer()
        magnitude = module.lora_magnitude_vector[active_adapter]
        read = (A, B, base_layer, magnitude)
        # the norm reads the weights of these modules
        with onloaded(*read) if any(map(is_managed, read)) else nullcontext():
            D, scaling = self.deviation(module.r[active_adapter], x), module.scaling[active_adapter]
            weight = base_matrix(module)
            K = times_core(B.weight.flatten(1), D)
            norm = row_norm(weight, A.weight.flatten(1), K, scaling)
            is_dropped = not is_dropout_free(module, active_adapter)
            is_one = not (is_dropped or self.is_conv or has_beta(D))
            if is_one and fits_one_function(A, B, x, result):
                base = frozen_base(module, result)
                if base is not None:
                    operand = self.channel.operand(self.key, D, result)
                    scale = (magnitude.weight, norm)
                    return linear_in_one(
                        x, result, base, A.weight, D, operand, B.weight, scaling, scale
                    )
            dtype = torch.promote_types(x.dtype, result.dtype)
            gain = (magnitude.weight.view(1, -1) / norm).to(dtype)  # (n, d_out)
            if is_dropped:
                dropped = module.lora_dropout[active_adapter](x)
                base = self._base(base_layer, weight, dropped)
                rise = self.rise(D, A, B, dropped)
                return result + self._scaled(base, gain - 1) + scaling * self._scaled(rise, gain)
            z = torch.add(result, self.rise(D, A, B, x), alpha=scaling)  # W0 x + b + s B C A x
            bias = base_layer.bias
            return self._scaled(z, gain, None if bias is None else bias.to(dtype))

    def _base(self, base_layer: nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
        """Return W0 x (b, …, d_out)."""
        return F.linear(x, weight.to(x.dtype))

    def _scaled(self, z: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return g ⊙ z + (1 − g) ⊙ b (b, …, d_out)."""
        rows = z.reshape(len(gain), -1, gain.shape[1])  # (n, l, d_out)
        return scaled(rows, gain[:, None], bias).view(z.shape)

    def merge_factor(
        self, module: AdaptedLayer, active_adapter: str, A: Tensor, K: Tensor
    ) -> Tensor:
        is_transposed = getattr(module, "fan_in_fan_out", False)
        with module._unmerged_base_weight(safe_merge=True) as weight:
            matrix = transpose(weight, is_transposed).flatten(1)
            norm = row_norm(matrix, A, K, module.scaling[active_adapter])[0]
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude.detach().flatten() / norm
        if isinstance(module, CONVOLUTIONS):
            return factor.view(-1, *(1,) * (module._kernel_dim - 1))
        return transpose(factor[:, None], is_transposed)


class NaraDoraConv(NaraDoraLinear):
    """Apply NaRA-DoRA to a convolution; a row of W0 is one output channel, flattened."""

    is_conv = True

    def _base(self, base_layer: nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
        return base_layer._conv_forward(x, base_layer.weight, None)  # type: ignore[operator]

    def _scaled(self, z: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return g ⊙ z + (1 − g) ⊙ b (b, d_out, …)."""
        columns = z.flatten(2)  # (b, d_out, l)
        bias = None if bias is None else bias[:, None]
        return scaled(columns, gain[:, :, None], bias).view(z.shape)
