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

from typing import NamedTuple, cast

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
        start = singular_triples(base_matrix(adapted).float(), count)
    else:
        start = singular_triples(torch.randn(len(B), A[0].numel()) / count, count, are_last=True)
    start_A, start_B = interleaved(start, start)
    A.copy_(start_A.view_as(A))
    B.copy_(start_B.view_as(B))


class Triples(NamedTuple):
    """P (d_out, k, …), σ (k,) or (1, k), and Q (k, d_in, …) of one module."""

    P: Tensor
    values: Tensor
    Q: Tensor


def singular_triples(matrix: Tensor, count: int, are_last: bool = False) -> Triples:
    """Return the first or the last k = `count` singular triples of a matrix (d_out, d_in).

    If it has fewer, the other directions are zero.
    """
    P, values, Q = torch.linalg.svd(matrix, full_matrices=False)
    chosen = slice(-count, None) if are_last else slice(None, count)
    missing = max(0, count - len(values))
    return Triples(
        nn.functional.pad(P[:, chosen], (0, missing)),
        nn.functional.pad(values[chosen], (0, missing)),
        nn.functional.pad(Q[chosen], (0, 0, 0, missing)),
    )


def interleaved(trained: Triples, start: Triples) -> tuple[Tensor, Tensor]:
    """Return A and B with 2 k directions, by turns a trained one and one of the start."""
    (P, values, Q), (P0, values0, Q0) = trained, start
    on_columns = (1, -1, *[1] * (P.dim() - 2))
    dtype = torch.promote_types(P.dtype, torch.float32)
    A = torch.stack([Q.to(dtype), Q0.reshape(Q.shape).to(dtype)], 1).flatten(0, 1)
    columns = P.to(dtype) * values.to(dtype).reshape(on_columns)
    columns0 = P0.reshape(P.shape).to(dtype) * values0.to(dtype).reshape(on_columns)
    return A, torch.stack([columns, -columns0], 2).flatten(1, 2)
