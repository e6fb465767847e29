"""What adding an adapter needs beside PEFT: a record by which it is taken back, and the cores out of PEFT's sight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .holder import HOLDER_NAME, CoreHolder


class Injection:
    """What one call of `inject_adapter` has done so far, and how to take it back.

    Args:
        holder: of the cores. changes_base: whether the initialisation takes s·B·A out of the base weights, as PiSSA's.
    """

    def __init__(self, holder: CoreHolder, changes_base: bool) -> None:
        self.holder = holder
        self.changes_base = changes_base
        self.layers: list[tuple[nn.Module, str, LoraLayer]] = []
        self.ranks: dict[str, int] = {}

    @property
    def device(self) -> torch.device:
        parameters = (p for _, _, layer in self.layers for p in layer.parameters())  # type: ignore[attr-defined]
        return next((p.device for p in parameters if p.device.type != "meta"), torch.device("cpu"))

    @property
    def disabled(self) -> bool:
        return any(layer.disable_adapters for _, _, layer in self.layers)

    def undo(self, adapter_name: str) -> None:
        for parent, name, layer in reversed(self.layers):
            self._restore_base(layer, adapter_name)
            layer._active_adapter = [active for active in layer.active_adapters if active != adapter_name]
            layer.delete_adapter(adapter_name)
            if not layer.r:
                setattr(parent, name, layer.base_layer)

    def _restore_base(self, layer: Any, adapter_name: str) -> None:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if self.changes_base and weight is not None and weight.is_floating_point():
            weight.data += layer.get_delta_weight(adapter_name).to(weight.dtype)


def drop_idle_holder(root: nn.Module) -> None:
    """Take the holder off `root`, with its hooks and its source of λ, if no adapter is left to serve."""
    holder = root._modules.get(HOLDER_NAME)
    if isinstance(holder, CoreHolder) and not (holder.cores and getattr(root, "peft_config", None)):
        holder.detach(root)


@contextmanager
def without_holder(root: nn.Module) -> Iterator[None]:
    """Inside, PEFT does not see the cores, whose parts are named as a base model's may be ("embeddings", "layers")."""
    holder = root._modules.pop(HOLDER_NAME, None)
    try:
        yield
    finally:
        if holder is not None:
            root._modules[HOLDER_NAME] = holder
