"""Start T-LoRA from singular vectors whose product is subtracted, as it was published.

    ΔW(λ) = α/k · (P diag(σ m(λ)) Q − P0 diag(σ0 m(λ)) Q0)          (T-LoRA, arXiv 2507.05964)

k singular triples (P0, σ0, Q0) of a matrix are the start of P, σ and Q, so ΔW = 0 at first. The
second product stays fixed. Here, A (2k, d_in) and B (d_out, 2k) of a LoRA of rank r = 2k hold both:

    A = [q_1, q0_1, q_2, q0_2, …]          B = [σ_1 p_1, −σ0_1 p0_1, σ_2 p_2, −σ0_2 p0_2, …]

and C(λ) is a rank mask whose directions go on and off two at a time. P and σ are trained as their
product; that is the one difference to the published form. The odd rows of A and columns of B get a
gradient of exactly 0, so an optimizer without weight decay leaves them as they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor

from .adapted_layer import AdaptedLayer, base_matrix
from .functional import mixed
from .variants import NaraLinear

RESIDUAL_STARTS = ("residual", "residual_base")
"""Values of `lora_a_init`: singular vectors of a random matrix, or of the layer's base weight."""


class ResidualLinear(NaraLinear):
    """Train only the even directions of a linear layer. See the module's docstring."""

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        if not (torch.is_grad_enabled() and A.requires_grad):
            return super().update(module, active_adapter, x, result)
        D = self.deviation(module.r[active_adapter], x)
        h = F.linear(module.lora_dropout[active_adapter](x), _with_fixed_odd_rows(A))
        update = F.linear(mixed(D, h), _with_fixed_odd_rows(B.T).T)
        return torch.add(result, update, alpha=module.scaling[active_adapter])


def _with_fixed_odd_rows(weight: Tensor) -> Tensor:
    """Return the values of `weight` (2k, n), of which only even rows get a gradient."""
    is_fixed = torch.arange(len(weight), device=weight.device) % 2 == 1
    return torch.where(is_fixed[:, None], weight.detach(), weight)


@torch.no_grad()
def start_from_singular_vectors(layer: LoraLayer, adapter_name: str, start: str) -> None:
    """Set A and B of a linear layer to both products. See the module's docstring.

    "residual" takes the last k triples of a random matrix with the standard deviation 1 / k, the
    default of T-LoRA's repository. "residual_base" takes the first k of the base weight, as LyCORIS
    does. If the matrix has fewer, the other directions are zero.
    """
    adapted = cast(Any, layer)
    A, B = adapted.lora_A[adapter_name].weight, adapted.lora_B[adapter_name].weight
    if A.is_meta:
        return
    count = len(A) // 2
    if start == "residual_base":
        P, values, Q = torch.linalg.svd(base_matrix(adapted).float(), full_matrices=False)
        chosen = slice(None, count)
    else:
        random = torch.randn(len(B), A.shape[1]) / count
        P, values, Q = torch.linalg.svd(random, full_matrices=False)
        chosen = slice(-count, None)
    Q, scaled = Q[chosen], P[:, chosen] * values[chosen]
    end = 2 * len(Q)
    A.zero_()
    B.zero_()
    A[0:end:2], A[1:end:2] = Q.to(A), Q.to(A)
    B[:, 0:end:2], B[:, 1:end:2] = scaled.to(B), -scaled.to(B)
