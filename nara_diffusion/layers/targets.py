"""Say which layers NaRA and NaRA-DoRA can adapt, and which LoRA variant each of them gets."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import Tensor, nn

from .adapted_layer import CONVOLUTIONS
from .dora import NaraDoraConv, NaraDoraLinear
from .offloading import is_float8
from .residual import ResidualConv, ResidualLinear
from .variants import NaraConv, NaraEmbedding, NaraLinear, NaraVariant

_FORWARDS = (lora.Linear.forward, Embedding.forward, lora.Conv2d.forward)
"""The forwards of PEFT's layers that call LoRA variants."""
_QUANTISED = ("Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear")
"""Names of further layers that call LoRA variants; their libraries may be missing."""


def check_target(target: nn.Module, reads_core: bool, name: str, core_type: str) -> None:
    """Raise an error for a module that NaRA cannot adapt, before PEFT adapts it.

    Args:
        reads_core: whether the update depends on a core.
        name: the module's name, for error messages.
        core_type: the type of the core.

    Raises:
        ValueError: no LoRA variant supports the module; the core is "film", which has a β, and the
            module isn't linear; or PEFT's layer would not compute the
            update in the same way as the module computes W0 x (the convolution A in PEFT ignores
            dilation and padding mode).
    """
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    if isinstance(base, nn.modules.conv._ConvNd) and (
        base.padding_mode != "zeros" or any(step != 1 for step in base.dilation)
    ):
        raise ValueError(
            f"NaRA cannot adapt '{name}' ({type(base).__name__} with padding_mode={base.padding_mode!r} and "
            f"dilation={base.dilation}): PEFT's convolution A has dilation 1 and pads with zeros, so the forward "
            "would not be that of W0 + s·B·C·A. Leave it out with `exclude_modules`."
        )
    if core_type == "film" and isinstance(base, (nn.modules.conv._ConvNd, nn.Embedding)):
        raise ValueError(
            f"NaRA cannot adapt '{name}' ({type(base).__name__}) with core_type 'film', whose β only linear layers "
            "add. Leave it out with `exclude_modules`."
        )
    if reads_core and isinstance(base, nn.MultiheadAttention):
        raise ValueError(
            f"NaRA cannot adapt '{name}' (MultiheadAttention): PEFT merges its update before each "
            'forward, without λ. Leave it out with `exclude_modules`, or use core_type="identity".'
        )


def variant_for(
    layer: LoraLayer, name: str, has_norm: bool, has_residual: bool = False
) -> type[NaraVariant]:
    """Return the LoRA variant for a PEFT layer, with DoRA's norm or T-LoRA's residual.

    Raises:
        ValueError: PEFT's class for the layer does not call LoRA variants, or an embedding
            would need a residual.
    """
    kind: type[Any] = type(layer)
    if kind.forward not in _FORWARDS and kind.__name__ not in _QUANTISED:
        raise ValueError(
            f"NaRA cannot adapt '{name}' ({type(layer.get_base_layer()).__name__}, adapted by "
            f"PEFT's {kind.__name__}): that class skips λ-dependent updates. Leave it out with "
            '`exclude_modules`, or use core_type="identity".'
        )
    if isinstance(layer, Embedding):
        if has_residual:
            raise ValueError(
                f"lora_a_init 'residual' and 'residual_base' are not for embeddings, such as '{name}'. Leave it out "
                "with `exclude_modules`."
            )
        return NaraEmbedding
    if has_residual:
        return ResidualConv if isinstance(layer, CONVOLUTIONS) else ResidualLinear
    if isinstance(layer, CONVOLUTIONS):
        return NaraDoraConv if has_norm else NaraConv
    return NaraDoraLinear if has_norm else NaraLinear


def check_norm(target: nn.Module | LoraLayer, name: str) -> None:
    """Raise ValueError if NaRA-DoRA cannot compute the norm of a module, whether adapted or not."""
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    weight, reason = getattr(base, "weight", None), ""
    if isinstance(base, nn.Embedding):
        reason = "an embedding: each sample would need the norm of a whole vocabulary"
    elif isinstance(weight, Tensor) and is_float8(weight.dtype):
        reason = (
            f"stored as {weight.dtype}, and its norm is needed: add the adapter before "
            "enable_layerwise_casting()"
        )
    elif isinstance(base, nn.modules.conv._ConvNd) and base.groups > 1:
        reason = "a convolution with groups"
    if reason:
        raise ValueError(
            f"NaRA-DoRA cannot adapt '{name}' ({type(base).__name__}), which is {reason}. Leave it "
            "out with `exclude_modules`, or set use_dora=False."
        )
