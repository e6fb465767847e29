"""Choose LoRA variants for layers, refuse modules without one, and change PEFT's new layers."""

from __future__ import annotations

from typing import Any, Protocol, cast

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

from .adapted_layer import CONVOLUTIONS
from .dora import NaraDoraConv, NaraDoraLinear
from .variants import NaraConv, NaraEmbedding, NaraLinear, NaraVariant

_FORWARDS = (lora.Linear.forward, Embedding.forward, lora.Conv2d.forward)
"""The forwards of PEFT's layers that call LoRA variants."""


class _OutsideAutocast:
    """True unless autocast is on; for PEFT's `cast_input_dtype_enabled`.

    PEFT converts a layer's input to the dtype of A. Under autocast, A's product converts it back:
    two kernels a layer, and two in backward.
    """

    def __bool__(self) -> bool:
        return not torch._C._is_any_autocast_enabled()


OUTSIDE_AUTOCAST = _OutsideAutocast()
_QUANTISED = ("Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear")
"""Names of further layers that call LoRA variants; their libraries may be missing."""

PEFT_DORA = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
"""PEFT's LoRA variants for DoRA on linear layers and convolutions."""


class _Options(Protocol):
    """The attributes of a NaraConfig that this module reads."""

    use_dora: bool

    @property
    def reads_core(self) -> bool: ...


def check_target(target: nn.Module, config: _Options, name: str) -> None:
    """Refuse a module that NaRA cannot adapt, before PEFT adapts it.

    Args:
        name: for messages.

    Raises:
        ValueError: PEFT's layer does not compute the update in the way the module computes W0 x
            (PEFT's convolution A has neither dilation nor padding mode); no LoRA variant covers the
            module; or NaRA-DoRA cannot compute its norm.
    """
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    if isinstance(base, nn.modules.conv._ConvNd):
        _check_convolution(base, name)
    if not config.reads_core:
        return
    if isinstance(base, nn.MultiheadAttention):
        raise ValueError(
            f"NaRA cannot adapt '{name}' (MultiheadAttention): PEFT merges its update before each "
            'forward, without λ. Leave it out by `exclude_modules`, or use core_type="identity".'
        )
    if config.use_dora:
        check_norm(base, name)


def _check_convolution(base: nn.modules.conv._ConvNd, name: str) -> None:
    if base.padding_mode != "zeros":
        option = f"padding_mode={base.padding_mode!r}"
    elif any(step != 1 for step in base.dilation):
        option = f"dilation={base.dilation}"
    else:
        return
    raise ValueError(
        f"NaRA cannot adapt '{name}' ({type(base).__name__} with {option}): PEFT's convolution A "
        "has dilation 1 and pads with zeros, so the forward would not be that of W0 + s·B·C·A. "
        "Leave it out by `exclude_modules`."
    )


def check_norm(base: nn.Module, name: str) -> None:
    """Raise ValueError if NaRA-DoRA cannot compute the norm of a base layer."""
    weight, reason = getattr(base, "weight", None), ""
    if isinstance(base, nn.Embedding):
        reason = "an embedding: each sample would need the norm of a whole vocabulary"
    elif isinstance(weight, Tensor) and _is_float8(weight.dtype):
        reason = (
            f"stored as {weight.dtype}, and its norm is needed: add the adapter before "
            "enable_layerwise_casting()"
        )
    elif isinstance(base, nn.modules.conv._ConvNd) and base.groups > 1:
        reason = "a convolution with groups"
    if reason:
        raise ValueError(
            f"NaRA-DoRA cannot adapt '{name}' ({type(base).__name__}), which is {reason}. Leave it "
            "out by `exclude_modules`, or set use_dora=False."
        )


def variant_for(layer: LoraLayer, use_dora: bool, name: str) -> type[NaraVariant]:
    """Return the LoRA variant for a layer that PEFT has made.

    Raises:
        ValueError: PEFT's class for the layer does not call LoRA variants.
    """
    kind: type[Any] = type(layer)
    if kind.forward not in _FORWARDS and kind.__name__ not in _QUANTISED:
        raise ValueError(
            f"NaRA cannot adapt '{name}' ({type(layer.get_base_layer()).__name__}, adapted by "
            f"PEFT's {kind.__name__}): that class skips λ-dependent updates. Leave it out by "
            '`exclude_modules`, or use core_type="identity".'
        )
    if isinstance(layer, Embedding):
        return NaraEmbedding
    if isinstance(layer, CONVOLUTIONS):
        return NaraDoraConv if use_dora else NaraConv
    return NaraDoraLinear if use_dora else NaraLinear


def keep_out_of_float8(layer: LoraLayer, adapter_name: str) -> None:
    """Convert A and B to float32 if PEFT made them float8.

    PEFT does so if the base weight is under layerwise casting.
    """
    for attribute in layer.adapter_layer_names:
        factors = cast(nn.Module, getattr(layer, attribute))
        for name, parameter in factors.named_parameters():
            if name.split(".")[0] == adapter_name and _is_float8(parameter.dtype):
                parameter.data = parameter.data.float()


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


@torch.no_grad()
def make_directions_orthonormal(layer: LoraLayer, adapter_name: str) -> None:
    """Replace the r directions of a layer with orthonormal ones; the other factor stays zero.

    The directions are the rows of A (r, d_in …), or the columns of an embedding's B (d_out, r). If
    there are more directions than features, the features are orthonormal instead.

    T-LoRA (arXiv 2507.05964) starts A and B as singular vectors of a random matrix, so that the
    directions do not overlap, and keeps frozen copies to subtract their product in each forward.
    Here B is zero, so no copies are needed.
    """
    if isinstance(layer, Embedding):
        factor = layer.lora_embedding_B[adapter_name]
    else:
        factor = cast(Tensor, layer.lora_A[adapter_name].weight)
    if not factor.is_meta:
        random = torch.empty(factor.shape, dtype=torch.float32)
        factor.copy_(nn.init.orthogonal_(random))
