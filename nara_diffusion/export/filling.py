"""Copying the tensors of a LoRA into an adapter with the same layers and shapes: all of them, or none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.tuner.strength.layers import layers_of
from nara_diffusion.utils.listing import listed

from .lora.plain_lora import PlainLora, PlainLoraLayer


def fill(root: nn.Module, adapter_name: str, lora: PlainLora, origin: str) -> None:
    """Copy A, B, biases of B and magnitudes of `lora` into an adapter of `root`. Cores stay as they are.

    Values are kept bit by bit: a parameter with a coarser dtype takes the dtype of the tensor.

    Args:
        origin: the name of the LoRA in messages.

    Raises:
        ValueError: the layers, ranks, scales, shapes or kinds of tensors differ; nothing is changed then.
    """
    layers = layers_of(root, adapter_name)
    check_layers(layers.keys(), lora.layers.keys(), adapter_name, origin)
    pairs = []
    for name, given in lora.layers.items():
        _check_scale(layers[name], name, given, adapter_name, origin)
        pairs += _pairs(layers[name], name, given, adapter_name, origin)
    for parameter, tensor in pairs:
        dtype = torch.promote_types(parameter.dtype, tensor.dtype)
        parameter.data = tensor.detach().to(parameter.device, dtype, copy=True)


def check_layers(adapted: Any, given: Any, adapter_name: str, origin: str) -> None:
    """Raises ValueError if the names of the adapter's layers (`adapted`) and the LoRA's (`given`) differ."""
    missing, surplus = sorted(given - adapted), sorted(adapted - given)
    if missing or surplus:
        texts = [f"the adapter lacks {listed(missing)}"] if missing else []
        texts += [f"the LoRA lacks {listed(surplus)}"] if surplus else []
        raise ValueError(
            f"{origin} has {len(given)} layers, the adapter '{adapter_name}' {len(adapted)}: {', and '.join(texts)}. "
            "Set target_modules to the layers of the LoRA."
        )


def _check_scale(layer: Any, name: str, given: PlainLoraLayer, adapter_name: str, origin: str) -> None:
    rank = layer.r[adapter_name]
    if rank != given.rank:
        raise ValueError(
            f"{origin} has rank {given.rank} in '{name}', the adapter {rank}: set the adapter's rank (r, or --rank) "
            "to that of the LoRA."
        )
    if not math.isclose(layer.scaling[adapter_name], given.scaling, rel_tol=1e-6):
        raise ValueError(
            f"{origin} has scale {given.scaling:g} (alpha {given.alpha:g} / rank {given.rank}) in '{name}', the "
            f"adapter {layer.scaling[adapter_name]:g}: set lora_alpha to {given.alpha:g} and use_rslora to False."
        )


def _pairs(
    layer: Any, name: str, given: PlainLoraLayer, adapter_name: str, origin: str
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter of the layer with its new value."""
    held, tensors = _parameters(layer, adapter_name), _tensors(given)
    if held.keys() != tensors.keys():
        raise ValueError(
            f"{origin} has {', '.join(tensors)} in '{name}', the adapter {', '.join(held)}: set use_dora (magnitude) "
            "and lora_bias (bias) as in the LoRA."
        )
    for kind, tensor in tensors.items():
        parameter = held[kind]
        # one-by-one kernels and magnitudes are written with and without their axes of length 1
        if parameter.squeeze().shape != tensor.squeeze().shape:
            raise ValueError(
                f"{kind} of '{name}' has shape {tuple(tensor.shape)} in {origin}, this layer needs "
                f"{tuple(parameter.shape)}: it was trained on another base model."
            )
        yield parameter, tensor.reshape(parameter.shape)


def _parameters(layer: Any, adapter_name: str) -> dict[str, nn.Parameter]:
    if adapter_name in layer.lora_embedding_A:
        found = {"A": layer.lora_embedding_A[adapter_name], "B": layer.lora_embedding_B[adapter_name]}
    else:
        A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        found = {"A": A.weight, "B": B.weight} | ({} if B.bias is None else {"bias": B.bias})
    if adapter_name in layer.lora_magnitude_vector:
        found["magnitude"] = layer.lora_magnitude_vector[adapter_name].weight
    return found


def _tensors(given: PlainLoraLayer) -> dict[str, Tensor]:
    all_ = {"A": given.A, "B": given.B, "bias": given.bias, "magnitude": given.magnitude}
    return {kind: tensor for kind, tensor in all_.items() if tensor is not None}
