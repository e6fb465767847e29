"""The matrices of adapted layers: A, B, W0 and ΔW = s B C A, quantised or not.

They are read for DoRA's norm and for merging, in the cases too in which PEFT reads bitsandbytes' weights wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
"""PEFT's layers on convolutions."""


def factors(module: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A (r, k) and B (d_out, r) of a layer that PEFT merges (none with groups), kernels flattened; detached."""
    if isinstance(module, Embedding):
        return module.lora_embedding_A[adapter_name].detach(), module.lora_embedding_B[
            adapter_name
        ].detach()
    A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
    return A.detach().flatten(1), B.detach().flatten(1)


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
    if isinstance(module, CONVOLUTIONS):
        return delta.view(base_layer.weight.shape)
    return transpose(delta, getattr(module, "fan_in_fan_out", False))


def base_weight(base_layer: Any) -> Tensor:
    """W0 of a layer, dequantised if need be.

    On a CPU, bitsandbytes reorders 4-bit weights at the first inference, after which they dequantise wrongly: then
    W0ᵀ = layer(I) − b. PEFT's function for 8-bit weights breaks later forwards, so that they are dequantised here.
    """
    weight = getattr(base_layer, "weight", None)
    if type(weight) is nn.Parameter and (
        type(base_layer) is nn.Linear or not hasattr(base_layer, "W_q")
    ):
        return weight  # PEFT's function would break a compiled graph
    if type(weight).__name__ == "Int8Params":
        held: Any = (
            weight if getattr(weight, "SCB", None) is not None else base_layer.state
        )  # after a first forward
        return held.CB.float() * (held.SCB.float()[:, None] / 127)
    if not _is_packed(base_layer):
        return dequantize_module_weight(base_layer)
    with torch.no_grad():
        identity = torch.eye(
            base_layer.in_features, dtype=torch.float32, device=base_layer.weight.device
        )
        product = base_layer(identity)
        return (product if base_layer.bias is None else product - base_layer.bias).T


def _is_packed(base_layer: Any) -> bool:
    weight = getattr(base_layer, "weight", None)
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def check_mergeable(layer: Any, adapter_name: str, layer_name: str, weight: Tensor) -> None:
    """Refuse layers that PEFT would merge wrongly, before anything is changed: with a bias of B, without one to add it
    to, or on a quantised layer, where PEFT forgets its scale; a 4-bit weight that bitsandbytes has reordered; or
    integers that PEFT takes for a plain weight. `weight`: what PEFT merges into, dequantised if PEFT does so."""
    base_layer = layer.get_base_layer()
    is_quantised = type(base_layer.weight).__name__ in ("Params4bit", "Int8Params")
    if layer.lora_bias[adapter_name] and (base_layer.bias is None or is_quantised):
        raise ValueError(
            f"The bias of B (lora_bias=True) cannot be merged into layer '{layer_name}', which is quantised or has no "
            "bias of its own."
        )
    if _is_packed(base_layer):
        raise ValueError(
            f"The 4-bit weight of layer '{layer_name}' cannot be merged: bitsandbytes has reordered it for inference "
            "on a CPU. Load the model again and merge before the first forward."
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"Layer '{layer_name}' cannot be merged: its weight is {weight.dtype}, which PEFT's {type(layer).__name__} "
            "doesn't dequantise. Leave it unmerged, or quantise the base by Transformers before adding the adapter."
        )
