"""How long a step with NaRA takes beside PEFT's LoRA, and with NaRA-DoRA beside PEFT's DoRA.

    python examples/benchmarks/benchmark_speed.py

Four square projections (q, k, v, o) of one attention layer, adapted by each method, with a batch whose samples have
different noise levels. The methods take turns within each round, so that whatever else the machine does meets all of
them; a ratio is the median of the rounds' ratios. A train step is forward, backward and AdamW. One thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from benchmark_record import save_record
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, noise_level

METHODS: dict[str, Callable[..., LoraConfig]] = {
    "LoRA": LoraConfig,
    "NaRA": NaraConfig,
    "DoRA": lambda **kwargs: LoraConfig(use_dora=True, **kwargs),
    "NaRA-DoRA": lambda **kwargs: NaraConfig(use_dora=True, **kwargs),
}
# the most that NaRA may take of its counterpart's time
TARGETS = {
    ("NaRA", "LoRA"): {"train": 1.0, "inference": 1.0},
    ("NaRA-DoRA", "DoRA"): {"train": 0.75, "inference": 0.80},
}


class Projections(nn.Module):
    """The four projections of an attention layer, chained so that each gets a gradient: x (b, l, d) -> (b, l, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) + self.k(x) + self.v(x))


class Arm:
    """One method's model with its steps; all arms see the same base weights and inputs."""

    def __init__(self, method: str, shape: tuple[int, int, int], rank: int) -> None:
        torch.manual_seed(0)
        config = METHODS[method](r=rank, lora_alpha=rank, target_modules=["q", "k", "v", "o"])
        self.model: PeftModel = get_peft_model(Projections(shape[-1]), config)
        # as after training: an adapter whose B or C - I is zero would not be a fair load
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        # inside a network the input is a hidden state, which gets a gradient too
        self.x = torch.randn(shape, requires_grad=True)  # (b, l, d)
        self.noise_levels = torch.linspace(0.1, 0.9, shape[0]) if method.startswith("NaRA") else None  # (b,)
        self.optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)

    def _noise(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.noise_levels is None else noise_level(self.model, self.noise_levels)

    def train(self) -> None:
        with self._noise():
            self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    @torch.inference_mode()
    def inference(self) -> None:
        with self._noise():
            self.model(self.x)


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(arms: dict[str, Arm], kind: str, rounds: int) -> dict[str, list[float]]:
    """Seconds that a step of each arm took in each round; in a round the arms come in a random order."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    shuffler = random.Random(0)
    for arm in arms.values():
        arm.model.train(kind == "train")
        # a first step allocates and fills caches
        getattr(arm, kind)()
    for _ in range(rounds):
        for name in shuffler.sample(sorted(arms), k=len(arms)):
            times[name].append(seconds(getattr(arms[name], kind)))
    return times


def summarize(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": median, "quartile_low": low, "quartile_high": high}


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


def main(
    rounds: int = 30,
    shape: tuple[int, int, int] = (4, 256, 1280),
    rank: int = 16,
    output_dir: str | Path = "outputs/benchmarks",
) -> dict[str, Any]:
    """Time every method `rounds` times; print a table, save it as JSON, return the figures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arms = {method: Arm(method, shape, rank) for method in METHODS}
        times = {kind: measure(arms, kind, rounds) for kind in ("train", "inference")}
        results = {
            kind: {name: summarize(values) for name, values in of_arms.items()} for kind, of_arms in times.items()
        }
        ratios = {
            f"{ours} / {theirs}": {kind: median_ratio(times[kind][ours], times[kind][theirs]) for kind in times}
            for ours, theirs in TARGETS
        }
        figures = {"shape": shape, "rank": rank, "rounds": rounds, "seconds": results, "ratios": ratios}
        file = save_record("benchmark_speed", figures, output_dir)
    finally:
        torch.set_num_threads(threads)
    report(results, ratios)
    print(f"saved to {file}")
    return figures


def report(results: dict[str, dict[str, dict[str, float]]], ratios: dict[str, dict[str, float]]) -> None:
    for kind, methods in results.items():
        for method, summary in methods.items():
            spread = f"{1e3 * summary['quartile_low']:.1f} to {1e3 * summary['quartile_high']:.1f}"
            print(f"{kind:10s} {method:10s} {1e3 * summary['median']:8.1f} ms   (half of them {spread})")
    for (ours, theirs), targets in TARGETS.items():
        for kind, target in targets.items():
            ratio = ratios[f"{ours} / {theirs}"][kind]
            print(f"{ours} / {theirs}, {kind}: {ratio:.3f}, {'within' if ratio <= target else 'ABOVE'} {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time NaRA beside LoRA and NaRA-DoRA beside DoRA.")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each method and kind (default: 30)")
    parser.add_argument("--output_dir", default="outputs/benchmarks", help="where the JSON record goes")
    arguments = parser.parse_args()
    main(rounds=arguments.rounds, output_dir=arguments.output_dir)
