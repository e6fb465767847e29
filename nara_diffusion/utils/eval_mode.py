"""How a model is run outside training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` within; afterwards each module is in the mode it had, also where modules differ."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def disabled(layers: Sequence[Any]) -> Iterator[None]:
    """PEFT's `layers` have their adapters disabled within, and nothing else is changed."""
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled


def without_ddp(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel, which has the same weights.

    DDP's own forward synchronises buffers, so it waits for ever if processes run different numbers of forwards.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
