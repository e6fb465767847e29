"""Decide which LoRA variant a layer gets, or refuse it; and the states of PEFT's layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import nn

from .adapted_layer import CONVOLUTIONS
from .variants import NaraConv, NaraEmbedding, NaraLinear, NaraVariant

_FORWARDS = (lora.Linear.forward, Embedding.forward, lora.Conv2d.forward)
"""The forwards of PEFT's layers that call LoRA variants."""
_QUANTISED = ("Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear")
"""Names of further layers that call LoRA variants; their libraries may be missing."""


def check_target(target: nn.Module, reads_core: bool, name: str) -> None:
    """Raise an error for a module that NaRA cannot adapt, before PEFT adapts it.

    Args:
        reads_core: whether the update depends on a core.
        name: the module's name, for error messages.

    Raises:
        ValueError: no LoRA variant supports the module, or PEFT's layer would not compute the
            update in the same way as the module computes W0 x (the convolution A in PEFT ignores
            dilation and padding mode).
    """
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    if isinstance(base, nn.modules.conv._ConvNd):
        _check_convolution(base, name)
    if reads_core and isinstance(base, nn.MultiheadAttention):
        raise ValueError(
            f"NaRA cannot adapt '{name}' (MultiheadAttention): PEFT merges its update before each "
            'forward, without λ. Leave it out with `exclude_modules`, or use core_type="identity".'
        )


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
        "Leave it out with `exclude_modules`."
    )


def variant_for(layer: LoraLayer, name: str) -> type[NaraVariant]:
    """Return the LoRA variant for a PEFT layer, without DoRA (`dora.with_norm` adds that).

    Raises:
        ValueError: PEFT's class for the layer does not call LoRA variants.
    """
    kind: type[Any] = type(layer)
    if kind.forward not in _FORWARDS and kind.__name__ not in _QUANTISED:
        raise ValueError(
            f"NaRA cannot adapt '{name}' ({type(layer.get_base_layer()).__name__}, adapted by "
            f"PEFT's {kind.__name__}): that class skips λ-dependent updates. Leave it out with "
            '`exclude_modules`, or use core_type="identity".'
        )
    if isinstance(layer, Embedding):
        return NaraEmbedding
    if isinstance(layer, CONVOLUTIONS):
        return NaraConv
    return NaraLinear


class _OutsideAutocast:
    """A flag for PEFT's `cast_input_dtype_enabled` that is true unless autocast is on.

    PEFT converts a layer's input to the dtype of A. Under autocast, the product with A converts it
    back. This would cost two kernels per layer, and two more in backward.
    """

    def __bool__(self) -> bool:
        return not torch._C._is_any_autocast_enabled()


OUTSIDE_AUTOCAST = _OutsideAutocast()


def keep_out_of_float8(layer: LoraLayer, adapter_name: str) -> None:
    """Convert A and B to float32 if PEFT made them float8.

    PEFT makes them float8 if the base weight is under layerwise casting.
    """
    for attribute in layer.adapter_layer_names:
        factors = cast(nn.Module, getattr(layer, attribute))
        for name, parameter in factors.named_parameters():
            if name.split(".")[0] == adapter_name and is_float8(parameter.dtype):
                parameter.data = parameter.data.float()


def is_float8(dtype: torch.dtype) -> bool:
    """Return whether `dtype` is an 8-bit float, a possible storage dtype of layerwise casting."""
    return dtype.is_floating_point and dtype.itemsize == 1
