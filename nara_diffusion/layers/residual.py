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

from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from .adapted_layer import AdaptedLayer, base_matrix
from .functional import mixed, mixed_channels
from .variants import NaraConv, NaraLinear, NaraVariant


class _Residual(NaraVariant):
    """Train only the even directions of a layer. See the module's docstring."""

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if not (torch.is_grad_enabled() and A.weight.requires_grad):
            return super().update(module, active_adapter, x, result)
        D = self.deviation(module.r[active_adapter], x)
        rows = with_fixed_odd_rows(A.weight)
        columns = with_fixed_odd_rows(B.weight.transpose(0, 1)).transpose(0, 1)
        h = functional_call(A, {"weight": rows}, (module.lora_dropout[active_adapter](x),))
        h = mixed_channels(D, h) if self.is_conv else mixed(D, h)
        update = functional_call(B, {"weight": columns}, (h,))
        return torch.add(result, update, alpha=module.scaling[active_adapter])


class ResidualLinear(_Residual, NaraLinear):
    """The variant of linear layers."""


class ResidualConv(_Residual, NaraConv):
    """The variant of convolutions."""


def with_fixed_odd_rows(weight: Tensor) -> Tensor:
    """Return the values of `weight` (2k, …), of which only even rows get a gradient."""
    is_fixed = torch.arange(len(weight), device=weight.device) % 2 == 1
    return torch.where(is_fixed.view(-1, *[1] * (weight.dim() - 1)), weight.detach(), weight)


@torch.no_grad()
def start_from_singular_vectors(layer: LoraLayer, adapter_name: str, of_base: bool) -> None:
    """Set A and B to both products. See the module's docstring.

    If there are fewer than k triples, the other directions are zero.

    Args:
        of_base: True for the first k triples of the base weight, as in LyCORIS. False for the last
            k of a random matrix with the standard deviation 1 / k, the default of T-LoRA's
            repository.
    """
    adapted = cast(AdaptedLayer, layer)
    A, B = adapted.lora_A[adapter_name].weight, adapted.lora_B[adapter_name].weight
    if A.is_meta:
        return
    count = len(A) // 2
    if of_base:
        P, values, Q = torch.linalg.svd(base_matrix(adapted).float(), full_matrices=False)
        chosen = slice(None, count)
    else:
        random = torch.randn(len(B), A[0].numel()) / count
        P, values, Q = torch.linalg.svd(random, full_matrices=False)
        chosen = slice(-count, None)
    Q, scaled = Q[chosen], P[:, chosen] * values[chosen]
    nn.init.zeros_(A)
    nn.init.zeros_(B)
    rows, columns = A.flatten(1), B.flatten(1)  # views
    for first, sign in ((0, 1), (1, -1)):
        rows[first : 2 * len(Q) : 2] = Q.to(A)
        columns[:, first : 2 * len(Q) : 2] = sign * scaled.to(B)
