"""Gradients of forwards at different λ, with and without gradient checkpointing, compared.

The reference is always the same model without checkpointing, and the case is always two forwards at different λ, one
value a sample, followed by one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig, noise_level
from tests.helpers.adapted import disturb, nara_config

LEVELS = (torch.tensor([0.05, 0.5, 0.93]), torch.tensor([0.8, 0.2, 0.6]))
TARGETS = ["q_proj", "v_proj", "down_proj"]
EXACT = 0.0
REENTRANT = 1e-6  # a reentrant checkpoint sums the two backward passes in another order
Gradients = dict[str, Tensor]


def gradients(model: nn.Module, forwards: list[Callable[[], Tensor]]) -> Gradients:
    """Of the sum of the forwards' losses; dropout draws the same in each call of this function."""
    model.zero_grad()
    losses = []
    for index, forward in enumerate(forwards):
        torch.manual_seed(index)
        losses.append(forward())
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(actual: Gradients, expected: Gradients, bound: float) -> None:
    """max |actual − expected| / max |expected| of each parameter is within `bound`; so is which have a gradient."""
    assert actual.keys() == expected.keys()
    assert any("nara_core." in name for name in expected)
    errors = {name: float((actual[name] - g).abs().max() / g.abs().max()) for name, g in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= bound, worst


def seeded(model: nn.Module, wrapper: Callable[..., nn.Module] = get_peft_model, **changes: Any) -> Any:
    """`model` in training, adapted with the same values, frequencies included, in each call."""
    torch.manual_seed(3)
    model = wrapper(model, nara_config(**{"target_modules": TARGETS, **changes}))
    disturb(model)
    return model.train()


def inject(model: nn.Module, config: NaraConfig) -> nn.Module:
    return inject_adapter_in_model(config, model)


def at(model: nn.Module, level: Tensor, loss: Callable[[nn.Module], Tensor]) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with noise_level(model, level):
            return loss(model)

    return forward


def llama_loss(model: nn.Module) -> Tensor:
    ids = torch.arange(15).view(3, 5) + 7
    return model(input_ids=ids, use_cache=False).logits.square().mean()


def llama_forwards(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [at(model, level, llama_loss) for level in LEVELS]


def square(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x).square().mean()
