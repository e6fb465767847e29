"""What `fuse_lora` may leave out: PEFT's layers run nothing beside their base once an adapter is fused into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.lora import LoraLayer


def active_in(model: Any) -> set[str]:
    """The adapters that are active in some layer, with plain LoRAs, which the holder of the cores doesn't list."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    return {name for layer in layers for name in layer.active_adapters}


def check_none_left_out(model: Any, active: Iterable[str], to_fuse: Iterable[str] = ()) -> None:
    """Refuse active adapters in layers into which another one is fused: they would have no effect there.

    Args:
        model: a component of a pipeline; None is passed by.
        active: names of the adapters that are to be active.
        to_fuse: names of those that are about to be fused, beside those that are.

    Raises:
        ValueError: there are such adapters; the message names one, and what to do.
    """
    chosen, fusing = set(active), set(to_fuse)
    for name, layer in () if model is None else model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        held = set(layer._get_available_adapters())
        fused = set(layer.merged_adapters) | (held & fusing)
        left_out = (held & chosen) - fused
        if fused and left_out:
            raise ValueError(
                f"In {type(model).__name__}'s layer '{name}' adapter {min(left_out)!r} would have no effect beside the "
                f"fused {min(fused)!r}, since PEFT runs a fused layer as it is: fuse both, or call unfuse_lora(). To "
                "go on from a fused LoRA, call unload_lora_weights() after fusing it, and load the other adapter then."
            )
