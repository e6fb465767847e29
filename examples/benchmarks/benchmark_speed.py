"""How long a step with NaRA takes beside PEFT's LoRA, and NaRA-DoRA beside PEFT's DoRA; and their kernels.

    python examples/benchmarks/benchmark_speed.py [--device cuda]

Four square projections (q, k, v, o) of one attention layer, adapted by each method, with a batch whose samples have
different noise levels, in float32 and in bfloat16 under autocast. The methods take turns within each round; a ratio is
the median of the rounds' ratios. A train step is forward, backward and AdamW. Inference runs twice with the same,
frozen weights, as sampling does. One thread. kernel_counts.py says what is counted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from benchmark_record import median_ratio, one_thread, run_command, save_record, summarize, times_in_turn
from kernel_counts import METHODS, kernels_of_layer
from peft import PeftModel, get_peft_model
from torch import nn

from nara_diffusion import noise_level

RATIOS = (("NaRA", "LoRA"), ("NaRA-DoRA", "DoRA"))
DTYPES = {"float32": torch.float32, "bfloat16 under autocast": torch.bfloat16}


class Projections(nn.Module):
    """The four projections of an attention layer, chained so that each gets a gradient: x (b, l, d) -> (b, l, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) + self.k(x) + self.v(x))


class Arm:
    """One method's model with its steps; all arms see the same base weights and inputs."""

    def __init__(
        self, method: str, shape: tuple[int, int, int], rank: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        config = METHODS[method](r=rank, lora_alpha=rank, target_modules=["q", "k", "v", "o"])
        self.model: PeftModel = get_peft_model(Projections(shape[-1]).to(dtype), config)
        self.is_autocast = dtype != torch.float32
        # as after training: an adapter whose B or C - I is zero would not be a fair load
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        self.model.to(device)
        # inside a network the input is a hidden state, which gets a gradient too
        self.x = torch.randn(shape).to(device, dtype).requires_grad_()  # (b, l, d)
        levels = torch.linspace(0.1, 0.9, shape[0], device=device)  # (b,)
        self.noise_levels = levels if method.startswith("NaRA") else None
        self.optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)

    def _forward(self) -> torch.Tensor:
        no_noise: AbstractContextManager[Any] = nullcontext()
        noise = no_noise if self.noise_levels is None else noise_level(self.model, self.noise_levels)
        with noise, torch.autocast(self.device, torch.bfloat16, enabled=self.is_autocast):
            return self.model(self.x)

    def train(self) -> None:
        self.model.train()
        self._forward().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None
        self.finish()

    def finish(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.accelerator.synchronize()

    def freeze(self) -> None:
        """Prepare for inference."""
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def inference(self) -> None:
        self._forward()
        self._forward()
        self.finish()


def times_of(
    dtype: torch.dtype, shape: tuple[int, int, int], rank: int, rounds: int, device: str = "cpu"
) -> dict[str, Any]:
    """{"train" or "inference": {method: seconds of each round}}."""
    arms = {method: Arm(method, shape, rank, dtype, device) for method in METHODS}
    train = times_in_turn({name: arm.train for name, arm in arms.items()}, rounds)
    for arm in arms.values():
        arm.freeze()
    return {"train": train, "inference": times_in_turn({name: arm.inference for name, arm in arms.items()}, rounds)}


def ratios_of(times: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{"NaRA / LoRA": {"train" or "inference": the median of the rounds' ratios}}."""
    ratios: dict[str, dict[str, float]] = {}
    for ours, theirs in RATIOS:
        ratios[f"{ours} / {theirs}"] = {kind: median_ratio(of[ours], of[theirs]) for kind, of in times.items()}
    return ratios


def main(
    rounds: int = 30,
    shape: tuple[int, int, int] = (4, 256, 1280),
    rank: int = 16,
    output_dir: str = "outputs/benchmarks",
    device: str = "cpu",
) -> dict[str, Any]:
    """Time every method `rounds` times; print a table, save it as JSON, return the figures."""
    seconds: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        with one_thread():
            times = times_of(dtype, shape, rank, rounds, device)
        seconds[name] = {
            kind: {method: summarize(values) for method, values in of.items()} for kind, of in times.items()
        }
        ratios[name] = ratios_of(times)
        for pair, ratio in ratios[name].items():
            print(f"{name:24s} {pair:16s} train {ratio['train']:.3f}, inference {ratio['inference']:.3f}")
    kernels = {method: kernels_of_layer(method) for method in METHODS}
    for method, of in kernels.items():
        counts = {kind: round(sum(operations.values())) for kind, operations in of.items()}
        print(f"{method:10s} kernels a layer: {counts}")
    figures = {"device": device, "shape": shape, "rank": rank, "rounds": rounds}
    figures |= {"seconds": seconds, "ratios": ratios, "kernels": kernels}
    print(f"saved to {save_record('benchmark_speed', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
