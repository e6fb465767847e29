"""An exponential moving average s of the trained weights θ, by Diffusers' `EMAModel`: `--ema_decay` D.

    s ← s + (1 − d) (θ − s),    d = min(D, n / (9 + n)) in step n + 1, and 0 in the first

so d is at most .917 after 100 steps. A checkpoint has both: θ, to train on from, and s in ema.bin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn


class WeightAverage(NamedTuple):
    """The average of trained weights, in their order and dtype."""

    ema: EMAModel
    weights: list[nn.Parameter]


def average_weights(
    accelerator: Accelerator, model: nn.Module, decay: float | None
) -> WeightAverage | None:
    """Return an average of the trained weights, which checkpoints will have; None without `decay`."""
    if decay is None:
        return None
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    average = WeightAverage(EMAModel(weights, decay), weights)
    accelerator.register_for_checkpointing(average.ema)
    return average


@contextmanager
def averaged(average: WeightAverage | None) -> Iterator[None]:
    """The trained weights are their average inside the context, if there is one."""
    if average is None:
        yield
        return
    average.ema.store(average.weights)
    average.ema.copy_to(average.weights)
    try:
        yield
    finally:
        average.ema.restore(average.weights)
