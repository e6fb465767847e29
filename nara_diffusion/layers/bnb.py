"""Base weights of layers quantised by bitsandbytes, in the cases in which PEFT reads or merges them wrongly."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


def base_weight(base_layer: Any) -> Tensor:
    """W0 of a layer, dequantised if need be.

    On a CPU, bitsandbytes reorders 4-bit weights at the first inference, after which they dequantise wrongly: then
    W0ᵀ = layer(I) − b. PEFT's function for 8-bit weights breaks later forwards, so that they are dequantised here.
    """
    if type(getattr(base_layer, "weight", None)) is nn.Parameter and not hasattr(base_layer, "W_q"):
        return base_layer.weight  # PEFT's function would break a compiled graph
    if type(base_layer.weight).__name__ == "Int8Params":
        return _int8_weight(base_layer)
    if not _is_packed(base_layer):
        return dequantize_module_weight(base_layer)
    with torch.no_grad():
        identity = torch.eye(base_layer.in_features, dtype=torch.float32, device=base_layer.weight.device)
        product = base_layer(identity)
        return (product if base_layer.bias is None else product - base_layer.bias).T


def _int8_weight(base_layer: Any) -> Tensor:
    """W0 from int8 codes and the largest value of each row; the first forward moves both from weight to state."""
    weight, state = base_layer.weight, base_layer.state
    codes, largest = (weight.CB, weight.SCB) if weight.SCB is not None else (state.CB, state.SCB)
    return codes.float() * (largest.float()[:, None] / 127)


def check_mergeable(layer: Any, adapter_name: str, layer_name: str) -> None:
    """Refuse layers that PEFT would merge wrongly, before anything is changed.

    Raises:
        ValueError: a bias of B without a bias to add it to, or on a quantised layer, where PEFT forgets its scale; or
            a 4-bit weight that bitsandbytes has reordered.
    """
    base_layer = layer.get_base_layer()
    if layer.lora_bias[adapter_name]:
        if base_layer.bias is None:
            raise ValueError(
                f"lora_bias=True on layer '{layer_name}', which has no bias of its own: there is nothing to merge the "
                "bias into."
            )
        if type(base_layer.weight).__name__ in ("Params4bit", "Int8Params"):
            raise ValueError(f"lora_bias=True on the quantised layer '{layer_name}': PEFT cannot merge that bias.")
    if _is_packed(base_layer):
        raise ValueError(
            f"The 4-bit weight of layer '{layer_name}' cannot be merged: bitsandbytes has reordered it for inference "
            "on a CPU. Load the model again and merge before the first forward."
        )


def _is_packed(base_layer: Any) -> bool:
    weight = getattr(base_layer, "weight", None)
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))
