"""What a training step of a method costs beside one of LoRA, both measured turn by turn in one process.

Two runs at different times differ by what else the machine did then. Here a step of one stands beside a step of the
other, and the ratio is taken of each such pair.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from statistics import median, quantiles
from typing import Any, NamedTuple

BASELINE = "lora"
WARM_UP, PAIRS = 5, 40


class Step(NamedTuple):
    """Attributes: the `loss` of one step of training, and how long it took, in `seconds`."""

    loss: float
    seconds: float


class Training(NamedTuple):
    """Attributes:
    record: what a record says of the run, and of its size: "trainable_parameters", "peak_memory_mib".
    steps: the training, a step each time that one is asked for.
    """

    record: Mapping[str, Any]
    steps: Iterator[Step]


def cost_record(own: Training, baseline: Training) -> dict[str, Any]:
    """The record of stage "cost": sizes, the median time of a step, and all as ratios to the baseline.

    Raises:
        ValueError: a training has too few steps.
    """
    started = time.perf_counter()
    ratios = {
        name: round(own.record[size] / baseline.record[size], 4)
        for name, size in (("parameters_ratio", "trainable_parameters"), ("memory_ratio", "peak_memory_mib"))
    }
    nothing = dict.fromkeys(("noise_levels", "losses", "validation_loss"))
    times = compared(own.steps, baseline.steps)
    return {**own.record, **ratios, **times, **nothing, "seconds": round(time.perf_counter() - started, 2)}


def compared(own: Iterator[Step], baseline: Iterator[Step]) -> dict[str, Any]:
    """Steps of `own` and `baseline` in turn → medians of their times, and median and quartiles of the ratio.

    Raises:
        ValueError: either has too few steps.
    """
    pairs = [(a.seconds, b.seconds) for a, b in islice(zip(own, baseline, strict=False), WARM_UP + PAIRS)][WARM_UP:]
    if len(pairs) < PAIRS:
        raise ValueError(f"a training has too few steps to be timed: expected {WARM_UP + PAIRS} at least.")
    low, middle, high = quantiles([mine / other for mine, other in pairs], n=4)
    return {
        "step_ms": round(1000 * median(mine for mine, _ in pairs), 2),
        "baseline_step_ms": round(1000 * median(other for _, other in pairs), 2),
        "step_ratio": round(middle, 4),
        "step_ratio_quartiles": [round(low, 4), round(high, 4)],
    }
