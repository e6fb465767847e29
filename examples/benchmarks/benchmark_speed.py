"""How long a step with NaRA takes beside PEFT's LoRA, NaRA-DoRA beside PEFT's DoRA, and both from parts.

    python examples/benchmarks/benchmark_speed.py

Four square projections (q, k, v, o) of one attention layer, adapted by each method, with a batch whose samples have
different noise levels. The methods take turns within each round; a ratio is the median of the rounds' ratios. A train
step is forward, backward and AdamW. "from parts" computes NaRA's layers step by step in place of one autograd function.
One thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from benchmark_record import median_ratio, one_thread, run_command, save_record, summarize, times_in_turn
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.layers import one_function

METHODS: dict[str, Callable[..., LoraConfig]] = {
    "LoRA": LoraConfig,
    "NaRA": NaraConfig,
    "DoRA": lambda **kwargs: LoraConfig(use_dora=True, **kwargs),
    "NaRA-DoRA": lambda **kwargs: NaraConfig(use_dora=True, **kwargs),
}
PARTS = " from parts"
RATIOS = (("NaRA", "LoRA"), ("NaRA-DoRA", "DoRA"), ("NaRA", f"NaRA{PARTS}"), ("NaRA-DoRA", f"NaRA-DoRA{PARTS}"))


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
        self.min_elements = sys.maxsize if method.endswith(PARTS) else one_function.MIN_ELEMENTS
        config = METHODS[method.removesuffix(PARTS)](r=rank, lora_alpha=rank, target_modules=["q", "k", "v", "o"])
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
        self.model.train()
        with self._noise(), patch.object(one_function, "MIN_ELEMENTS", self.min_elements):
            self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    @torch.inference_mode()
    def inference(self) -> None:
        self.model.eval()
        with self._noise(), patch.object(one_function, "MIN_ELEMENTS", self.min_elements):
            self.model(self.x)


def main(
    rounds: int = 30,
    shape: tuple[int, int, int] = (4, 256, 1280),
    rank: int = 16,
    output_dir: str = "outputs/benchmarks",
) -> dict[str, Any]:
    """Time every method `rounds` times; print a table, save it as JSON, return the figures."""
    with one_thread():
        arms = {method: Arm(method, shape, rank) for method in (*METHODS, f"NaRA{PARTS}", f"NaRA-DoRA{PARTS}")}
        times = {
            kind: times_in_turn({name: getattr(arm, kind) for name, arm in arms.items()}, rounds)
            for kind in ("train", "inference")
        }
    results = {kind: {name: summarize(values) for name, values in of.items()} for kind, of in times.items()}
    ratios = {
        f"{ours} / {theirs}": {kind: median_ratio(times[kind][ours], times[kind][theirs]) for kind in times}
        for ours, theirs in RATIOS
    }
    for kind, methods in results.items():
        for method, each in methods.items():
            spread = f"{1e3 * each['quartile_low']:.1f} to {1e3 * each['quartile_high']:.1f}"
            print(f"{kind:10s} {method:20s} {1e3 * each['median']:8.1f} ms   (half of them {spread})")
    for name, ratio in ratios.items():
        print(f"{name}: train {ratio['train']:.3f}, inference {ratio['inference']:.3f}")
    figures = {"shape": shape, "rank": rank, "rounds": rounds, "seconds": results, "ratios": ratios}
    print(f"saved to {save_record('benchmark_speed', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
