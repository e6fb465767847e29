"""What `layers.fused` saves: an adapted linear layer as one autograd function, beside the same from its parts.

    python examples/benchmarks/benchmark_fused.py

One square layer, adapted with NaRA or NaRA-DoRA, with a noise level for each sample and an input that needs a gradient,
as inside a network; its cores are knots, which cost next to nothing, so that the layer is what is compared. Both ways
take turns, each of them first every other time, and a ratio is the median of the rounds' ratios; below 1, the fused way
is better. Time is the process's own on one thread, whatever else the machine does. Peak memory is the most that a step
holds of what it has allocated, its output included. Layers whose output has fewer than `fused.MIN_ELEMENTS` numbers are
computed from their parts, by these figures. Takes about 6 minutes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports each start and stop else
import torch
from benchmark_record import save_record
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import nara_diffusion.layers.fused as fused
from nara_diffusion import NaraConfig, noise_level

Shape = tuple[int, int, int]
# (b, l, d) → ranks
SIZES: dict[Shape, Sequence[int]] = {
    (2, 16, 64): (4, 16, 64),
    (2, 64, 256): (4, 16, 64),
    (2, 128, 256): (4, 16, 64),
    (4, 128, 640): (4, 16, 64),
    (4, 256, 1280): (4, 16, 64),
    (4, 512, 2048): (4, 16, 64),
    (8, 1024, 4096): (4, 64),
}
FORMS = {"NaRA": False, "NaRA-DoRA": True}
PASSES = ("forward", "forward and backward")
WAYS = ("fused", "parts")
MIN_ELEMENTS = fused.MIN_ELEMENTS
MIN_ROUNDS, MAX_ROUNDS = 3, 200


@contextmanager
def taking(way: str) -> Iterator[None]:
    """Inside, layers compute in the given way."""
    with patch.object(fused, "MIN_ELEMENTS", 0 if way == "fused" else sys.maxsize):
        yield


def adapted_layer(width: int, rank: int, use_dora: bool) -> PeftModel:
    torch.manual_seed(0)
    config = NaraConfig(r=rank, lora_alpha=rank, target_modules=["0"], use_dora=use_dora, core_type="knots")
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config)
    with torch.no_grad():  # as after training
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def make_step(model: PeftModel, shape: Shape, kind: str) -> Callable[[], None]:
    x = torch.randn(shape, requires_grad=True)
    of_output = torch.randn(shape)
    noise_levels = torch.linspace(0.1, 0.9, shape[0])

    def backward() -> None:
        with noise_level(model, noise_levels):
            output: Tensor = model(x)
        output.backward(of_output)
        x.grad = None
        model.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        with noise_level(model, noise_levels):
            model(x)

    return forward if kind == "forward" else backward


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that a step holds at once of what it has allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)


def seconds(step: Callable[[], None], way: str) -> float:
    with taking(way):
        start = time.process_time()
        step()
        return time.process_time() - start


def measure(step: Callable[[], None], budget: float) -> dict[str, Any]:
    """Time and peak memory of both ways. `budget`: seconds, which the fewest rounds may exceed."""
    peaks = {}
    for way in WAYS:  # a first step of each, which fills caches
        with taking(way):
            peaks[way] = peak_bytes(step)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() < end):
        for way in WAYS if rounds % 2 else reversed(WAYS):
            times[way].append(seconds(step, way))
        rounds += 1
    return {
        "rounds": rounds,
        "seconds": {way: statistics.median(values) for way, values in times.items()},
        "time_ratio": statistics.median(a / b for a, b in zip(times["fused"], times["parts"], strict=True)),
        "peak_bytes": peaks,
        "memory_ratio": peaks["fused"] / peaks["parts"],
    }


def main(
    sizes: Mapping[Shape, Sequence[int]] = SIZES,
    budget: float = 2.0,
    output_dir: str | Path = "outputs/benchmarks",
) -> dict[str, Any]:
    """Measure every size, rank, form and pass; print a line each, save all as JSON, return it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = []
    try:
        for form, (shape, ranks) in itertools.product(FORMS, sizes.items()):
            for rank, kind in itertools.product(ranks, PASSES):
                model = adapted_layer(shape[-1], rank, FORMS[form])
                found = measure(make_step(model, shape, kind), budget)
                cases.append({"form": form, "shape": list(shape), "rank": rank, "pass": kind, **found})
                report(cases[-1])
        figures = {"min_elements": MIN_ELEMENTS, "budget_seconds": budget, "cases": cases}
        print(f"saved to {save_record('benchmark_fused', figures, output_dir)}")
    finally:
        torch.set_num_threads(threads)
    return figures


def report(case: dict[str, Any]) -> None:
    milliseconds, megabytes = ({way: values[way] for way in WAYS} for values in (case["seconds"], case["peak_bytes"]))
    print(
        f"{case['form']:9s} {case['shape']!s:16s} r {case['rank']:2d}  {case['pass']:20s} "
        f"time {case['time_ratio']:.2f} ({1e3 * milliseconds['fused']:.2f} / {1e3 * milliseconds['parts']:.2f} ms)   "
        f"memory {case['memory_ratio']:.2f} ({megabytes['fused'] / 1e6:.2f} / {megabytes['parts'] / 1e6:.2f} MB)",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare fused layers with the same from their parts.")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds to time each case for (default: 2)")
    parser.add_argument("--output_dir", default="outputs/benchmarks", help="where the JSON record goes")
    arguments = parser.parse_args()
    main(budget=arguments.budget, output_dir=arguments.output_dir)
