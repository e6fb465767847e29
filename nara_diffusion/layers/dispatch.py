"""Which LoRA variant an adapted layer gets, which modules can have none, and what PEFT's new layers need changed."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn

from .dora import NaraDoraConv, NaraDoraLinear
from .matrices import CONVOLUTIONS
from .variants import NaraConv, NaraEmbedding, NaraLinear, NaraVariant

_FORWARDS = (lora.Linear.forward, Embedding.forward, lora.Conv2d.forward)
_QUANTISED = ("Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear")
"""Of PEFT's layers, those that call LoRA variants: by their forward, and by name where a library may be absent."""

PEFT_DORA = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
"""PEFT's LoRA variants for DoRA on linear layers and convolutions."""


def check_target(target: Any, config: Any, name: str) -> None:
    """Refuse modules, before PEFT adapts them, of which its layer doesn't compute the update as W0's (its convolution A
    has neither dilation nor padding mode), that no LoRA variant covers, or of which NaRA-DoRA cannot have the norm.

    Args: config: a NaraConfig. name: for messages.
    """
    base: Any = target.get_base_layer() if isinstance(target, LoraLayer) else target
    is_convolution, kind = isinstance(base, nn.modules.conv._ConvNd), type(base).__name__
    if is_convolution and (
        base.padding_mode != "zeros" or any(step != 1 for step in base.dilation)
    ):
        option = (
            f"padding_mode={base.padding_mode!r}"
            if base.padding_mode != "zeros"
            else f"dilation={base.dilation}"
        )
        raise ValueError(
            f"NaRA cannot adapt '{name}' ({kind} with {option}): PEFT's convolution A has dilation 1 and pads with "
            "zeros, so that the forward wouldn't be that of W0 + s·B·C·A. Leave it out by `exclude_modules`."
        )
    if config.reads_core and isinstance(base, nn.MultiheadAttention):
        raise ValueError(
            f"NaRA cannot adapt '{name}' (MultiheadAttention): PEFT merges its update before each forward, at no λ. "
            'Leave it out by `exclude_modules`, or use core_type="identity".'
        )
    if config.reads_core and config.use_dora:
        check_norm(base, name)


def check_norm(base: nn.Module, name: str) -> None:
    """Refuse a base layer of which NaRA-DoRA's norm cannot be had."""
    weight, why = getattr(base, "weight", None), ""
    if isinstance(base, nn.Embedding):
        why = (
            "an embedding, of which the norm of a whole vocabulary would be needed for each sample"
        )
    elif isinstance(weight, Tensor) and _is_float8(weight.dtype):
        why = f"stored as {weight.dtype}, and its norm is needed: add the adapter before enable_layerwise_casting()"
    elif isinstance(base, nn.modules.conv._ConvNd) and base.groups > 1:
        why = "a convolution with groups"
    if why:
        raise ValueError(
            f"NaRA-DoRA cannot adapt '{name}' ({type(base).__name__}), which is {why}. Leave it out by "
            "`exclude_modules`, or set use_dora=False."
        )


def variant_for(layer: Any, use_dora: bool, name: str) -> type[NaraVariant]:
    """The LoRA variant for `layer`, which PEFT has made; refused if PEFT's class of it does not call variants."""
    if type(layer).forward not in _FORWARDS and type(layer).__name__ not in _QUANTISED:
        raise ValueError(
            f"NaRA cannot adapt '{name}' ({type(layer.get_base_layer()).__name__}, adapted by PEFT's "
            f"{type(layer).__name__}): that class skips λ-dependent updates. Leave it out by `exclude_modules`, or use "
            'core_type="identity".'
        )
    if isinstance(layer, Embedding):
        return NaraEmbedding
    if isinstance(layer, CONVOLUTIONS):
        return NaraDoraConv if use_dora else NaraConv
    return NaraDoraLinear if use_dora else NaraLinear


def keep_out_of_float8(layer: Any, adapter_name: str) -> None:
    """Convert A and B to float32 if PEFT made them float8, like a base weight under layerwise casting."""
    for factors in (getattr(layer, name) for name in layer.adapter_layer_names):
        for name, parameter in factors.named_parameters():
            if name.split(".")[0] == adapter_name and _is_float8(parameter.dtype):
                parameter.data = parameter.data.float()


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


@torch.no_grad()
def make_directions_orthonormal(layer: Any, adapter_name: str) -> None:
    """Replace the r directions of PEFT's layer: the rows of A (r, d_in …), or the columns of an embedding's B (d_out,
    r); with more directions than features, the features are orthonormal instead. The other factor stays zero.

    T-LoRA (arXiv 2507.05964) starts A and B as singular vectors of a random matrix, so that the directions do not
    overlap, and subtracts their product from each forward by frozen copies. Here B is zero, and no copies are needed.
    """
    embeds = isinstance(layer, Embedding)
    factor = layer.lora_embedding_B[adapter_name] if embeds else layer.lora_A[adapter_name].weight
    if not factor.is_meta:
        factor.copy_(nn.init.orthogonal_(torch.empty(factor.shape, dtype=torch.float32)))
