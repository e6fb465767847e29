"""How a model runs outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def without_ddp(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel, which has the same weights.

    DDP's own forward synchronises buffers, so it waits for ever if processes run different numbers of forwards.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
