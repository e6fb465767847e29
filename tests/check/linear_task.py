"""A training whose answer is known: y = W x is to become y = (W + f(λ) u vᵀ) x, from an x that doesn't tell λ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.check.trial import CheckTask, published
from nara_diffusion.training.arguments.common import AdapterArguments, OptimizationArguments

D_IN, D_OUT, RANK = 7, 5, 3
BATCH, STEP = 10, 20

Loss = Callable[[Sequence[int]], Any]


def linear_task(needed: Callable[[Tensor], Tensor], **changes: Any) -> CheckTask:
    """`needed` is f; `changes` are those of the optimization's arguments."""
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False)).requires_grad_(False)
    model[0].weight.data = drawn(D_OUT, D_IN, seed=1)
    config = NaraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    inject_adapter_in_model(config, model)
    loss = linear_loss(model, needed, lambda levels: noise_level(model, levels))
    adapter = AdapterArguments(adapter="lora", rank=RANK, target_modules=["0"])
    rates = {"learning_rate": 0.03, "core_learning_rate": 0.01, "max_grad_norm": None}
    args = published(SimpleNamespace(**vars(adapter), **vars(OptimizationArguments(**rates | changes)), seed=0))
    return CheckTask(model, config, args, loss, loss, BATCH, STEP)


def linear_loss(
    model: nn.Module, needed: Callable[[Tensor], Tensor], tell: Callable[[Tensor], Any] = lambda levels: nullcontext()
) -> Loss:
    """Positions → the loss of `model`, which is told λ by `tell`."""
    weight, change = drawn(D_OUT, D_IN, seed=1), torch.outer(drawn(D_OUT, seed=2), drawn(D_IN, seed=3))

    def loss(positions: Sequence[int]) -> SimpleNamespace:
        x = torch.stack([drawn(3, D_IN, seed=position) for position in positions])  # (b, 3, d_in)
        levels = torch.stack([drawn(seed=position + 10**6, uniform=True) for position in positions])  # (b,)
        wanted = x @ weight.T + needed(levels)[:, None, None] * (x @ change.T)
        with tell(levels):
            errors = (model(x) - wanted).square().mean((1, 2))  # (b,)
        return SimpleNamespace(loss=errors.mean(), per_sample=errors, noise_level=levels, split=None)

    return loss


def drawn(*shape: int, seed: int, uniform: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if uniform else torch.randn)(shape, generator=generator)
