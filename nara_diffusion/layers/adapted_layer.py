"""Read attributes of PEFT's adapted layers, and the matrices A, B, W0 and ΔW.

DoRA's norm and merging need these matrices. They are also correct for quantised layers, including
bitsandbytes layers that PEFT reads wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
"""PEFT's layers on convolutions."""


class AdaptedLayer(nn.Module, LoraLayer):
    """A layer that PEFT has adapted, with the types of what NaRA reads; PEFT makes all instances.

    Its mappings are keyed by adapter name.

    Attributes:
        lora_A, lora_B: the factors as linear layers or convolutions, except those of embeddings.
        lora_embedding_A, lora_embedding_B: the factors of an embedding, (r, n) and (d_out, r).
        lora_magnitude_vector: modules that hold DoRA's m as `weight`.
        _kernel_dim: the number of dimensions of a convolution's weight: its spatial axes plus 2.
        _embed: returns the rows of an embedding's weight for the given ids.
        _get_embed_scale: returns the factor that scales the base embedding's output, as in Gemma.
    """

    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_magnitude_vector: Mapping[str, nn.Linear]
    _kernel_dim: int
    _embed: Callable[[Tensor, Tensor], Tensor]
    _get_embed_scale: Callable[[], Tensor | None]

    def get_base_layer(self) -> nn.Linear:
        """Return the base layer. It may be of any kind, although the annotation is `nn.Linear`."""
        ...


def factors(layer: AdaptedLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return A (r, k) and B (d_out, r), detached, with flattened kernels.

    `layer` is never a grouped convolution, since PEFT does not merge those.
    """
    if isinstance(layer, Embedding):
        A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        return A.detach(), B.detach()
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return A.detach().flatten(1), B.detach().flatten(1)


def base_matrix(layer: AdaptedLayer) -> Tensor:
    """Return W0 (d_out, k) of a linear layer or a convolution, dequantised if necessary."""
    weight = base_weight(layer.get_base_layer())
    return transpose(weight, getattr(layer, "fan_in_fan_out", False)).flatten(1)


def delta_weight(layer: AdaptedLayer, A: Tensor, K: Tensor, scaling: float) -> Tensor:
    """Return s K A for A (r, k) and K = B C (d_out, r), in the layout of the base weight."""
    delta = scaling * (K @ A.to(K.dtype))  # (d_out, k)
    if isinstance(layer, Embedding):
        return delta.T
    if isinstance(layer, CONVOLUTIONS):
        return delta.view(layer.get_base_layer().weight.shape)
    return transpose(delta, getattr(layer, "fan_in_fan_out", False))


def base_weight(base_layer: nn.Module) -> Tensor:
    """Return W0 of a layer, dequantised if necessary.

    PEFT's own function would break a compiled graph, so it is not called for plain weights. It
    would also break later forwards of 8-bit layers, so these are dequantised here. On a CPU,
    bitsandbytes reorders 4-bit weights at the first inference and then dequantises them wrongly.
    For these weights, this function computes W0ᵀ = layer(I) − b.
    """
    weight = getattr(base_layer, "weight", None)
    is_linear = type(base_layer) is nn.Linear
    if type(weight) is nn.Parameter and (is_linear or not hasattr(base_layer, "W_q")):  # HQQ has it
        return weight
    if type(weight).__name__ == "Int8Params":
        is_before_forward = getattr(weight, "SCB", None) is not None
        state: Any = weight if is_before_forward else base_layer.state
        return state.CB.float() * (state.SCB.float()[:, None] / 127)
    if not _is_packed(base_layer):
        if type(weight).__name__ == "Params4bit":  # on a CPU, the other would replace the parameter
            return dequantize_bnb_weight(cast(nn.Parameter, weight))
        return dequantize_module_weight(base_layer)
    linear = cast(nn.Linear, base_layer)
    identity = torch.eye(linear.in_features, dtype=torch.float32, device=linear.weight.device)
    with torch.no_grad():
        product = linear(identity)
        return (product if linear.bias is None else product - linear.bias).T


def _is_packed(base_layer: nn.Module) -> bool:
    """Return whether bitsandbytes has reordered the 4-bit weight."""
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def check_mergeable(
    layer: AdaptedLayer, adapter_name: str, layer_name: str, weight: Tensor
) -> None:
    """Raise an error, before anything is changed, if PEFT would merge a layer wrongly.

    Args:
        weight: the weight that PEFT merges into, dequantised if PEFT dequantises it.

    Raises:
        ValueError: B has a bias, but the layer has no bias to add it to, or is quantised (PEFT
            would ignore the scale). Or bitsandbytes has reordered the 4-bit weight. Or PEFT treats
            an integer weight as a floating-point weight.
    """
    base_layer = layer.get_base_layer()
    is_quantised = type(base_layer.weight).__name__ in ("Params4bit", "Int8Params")
    if layer.lora_bias[adapter_name] and (base_layer.bias is None or is_quantised):
        raise ValueError(
            f"The bias of B (lora_bias=True) cannot be merged into layer '{layer_name}', which is "
            "quantised or has no bias."
        )
    if _is_packed(base_layer):
        raise ValueError(
            f"The 4-bit weight of layer '{layer_name}' cannot be merged: bitsandbytes has "
            "reordered it for inference on a CPU. Load the model again and merge before the first "
            "forward."
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"Layer '{layer_name}' cannot be merged: its weight is {weight.dtype}, and PEFT's "
            f"{type(layer).__name__} doesn't dequantise it. Leave it unmerged, or quantise the base "
            "by Transformers before adding the adapter."
        )


@torch.no_grad()
def make_directions_orthonormal(layer: LoraLayer, adapter_name: str) -> None:
    """Replace the r directions of a layer with orthonormal directions.

    The directions are the rows of A (r, d_in …), or the columns of an embedding's B (d_out, r). If
    there are more directions than features, the features are orthonormal instead. The other factor
    stays zero.

    T-LoRA (arXiv 2507.05964) initialises A and B with singular vectors of a random matrix, so that
    the directions do not overlap. It keeps frozen copies of A and B, and subtracts their product in
    each forward. Here B is zero, so no copies are needed.
    """
    if isinstance(layer, Embedding):
        factor = layer.lora_embedding_B[adapter_name]
    else:
        factor = cast(Tensor, layer.lora_A[adapter_name].weight)
    if not factor.is_meta:
        factor.copy_(nn.init.orthogonal_(torch.empty(factor.shape, dtype=torch.float32)))
