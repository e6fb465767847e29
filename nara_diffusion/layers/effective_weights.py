"""The matrices by which the modules of an adapted layer map their inputs: A, B, W0 and ΔW = s B C A.

A module's `weight` may differ from that matrix. Pruning, `weight_norm` and `spectral_norm` recompute it before each
call, and hooks may change inputs or outputs. So the weights of A and B are read only if nothing changes their call.
Otherwise the modules are called (NaRA's update), or their matrix is found by calling them (DoRA's norm, merging).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.modules.module as global_hooks
from peft.tuners.lora.layer import Embedding, _ConvNd
from peft.utils.other import transpose
from torch import Tensor, nn

from .bnb import base_weight
from .offloading import is_managed

# PyTorch's own dictionaries, which are filled and emptied and stay the same objects.
GLOBAL_HOOKS = tuple(
    getattr(global_hooks, f"_global_{kind}")
    for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(layer: Any) -> bool:
    """Whether `layer` is an `nn.Linear` with plain parameters, and no hook or wrapper changes its call."""
    return "forward" not in vars(layer) and _has_plain_weight(layer)


def may_read(layer: Any) -> bool:
    """Whether a product with the weight of `layer` equals its call, inside `offloading.onloaded`."""
    return _has_plain_weight(layer) and not _has_own_forward(layer) and not any(GLOBAL_HOOKS)


def _has_plain_weight(layer: Any) -> bool:
    """Whether the weight is a parameter. It is none if something recomputes it (pruning, weight_norm, FSDP1)."""
    if type(layer) is not nn.Linear:
        return False
    own = vars(layer)
    parameters = own["_parameters"]
    return (
        type(parameters.get("weight")) is nn.Parameter
        and "bias" in parameters
        and not any(own[hooks] for hooks in _HOOKS)
    )


def effective_weight(layer: Any) -> Tensor:
    """The matrix by which `layer` maps its input now, detached.

    It includes hooks on the inputs and outputs of a linear layer, but not those of a convolution, as in PEFT's DoRA:
    there it is the weight after a call.
    """
    own = vars(layer)
    if not (own["_forward_hooks"] or own["_forward_pre_hooks"] or _has_own_forward(layer)):
        return layer.weight.detach()
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    with torch.no_grad(), torch.autocast(layer.weight.device.type, enabled=False):
        if layer.weight.dim() > 2:
            layer(torch.zeros(1, layer.in_channels, *(_extent(layer)), **like))
            return layer.weight.detach()
        zero_and_unit = torch.eye(layer.in_features + 1, **like)[:, 1:]  # (1 + d_in, d_in)
        rows = layer(zero_and_unit)
        return (rows[1:] - rows[0]).T


def _has_own_forward(layer: Any) -> bool:
    """Whether `forward` was replaced on this object, other than by an offloading hook."""
    return "forward" in vars(layer) and not is_managed(layer)


def _extent(convolution: Any) -> list[int]:
    """The smallest input, in each spatial axis, for which a convolution has an output."""
    sizes = zip(convolution.kernel_size, convolution.dilation, strict=True)
    return [(kernel - 1) * dilation + 1 for kernel, dilation in sizes]


def factors(module: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A (r, k) and B (d_out, r) of any adapted layer, kernels flattened and groups written out."""
    if isinstance(module, Embedding):
        return module.lora_embedding_A[adapter_name].detach(), module.lora_embedding_B[adapter_name].detach()
    A, B = (effective_weight(layers[adapter_name]).flatten(1) for layers in (module.lora_A, module.lora_B))
    groups = getattr(module.get_base_layer(), "groups", 1)
    return A, B if groups == 1 else torch.block_diag(*B.chunk(groups))


def base_matrix(module: Any) -> Tensor:
    """W0 (d_out, k) of a linear layer, dequantised if need be, or of a convolution."""
    weight = base_weight(module.get_base_layer())
    return transpose(weight, getattr(module, "fan_in_fan_out", False)).flatten(1)


def delta_weight(module: Any, A: Tensor, K: Tensor, scaling: float) -> Tensor:
    """s K A for A (r, k) and K = B C (d_out, r), in the layout of the base layer's weight."""
    base_layer: Any = module.get_base_layer()
    delta = scaling * (K @ A.to(K.dtype))  # (d_out, k)
    if isinstance(module, Embedding):
        return delta.T
    if isinstance(module, _ConvNd):
        return delta.view(base_layer.weight.shape)
    return transpose(delta, getattr(module, "fan_in_fan_out", False))
