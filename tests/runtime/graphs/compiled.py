"""Outputs and gradients of a model at one λ, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import relative_error
from tests.helpers.rounding import rounding_of

LEVELS = [torch.tensor([0.05, 0.5, 0.93]), torch.tensor([0.8, 0.2, 0.6]), torch.tensor([0.0, 1.0, 1.0])]

Forward = Callable[[nn.Module], Tensor]


def output(model: nn.Module, named: nn.Module, forward: Forward, level: float | Tensor) -> Tensor:
    with noise_level(named, level), torch.no_grad():
        return forward(model)


def gradients(model: nn.Module, named: nn.Module, forward: Forward, level: float | Tensor) -> dict[str, Tensor]:
    named.zero_grad()
    with noise_level(named, level):
        forward(model).square().mean().backward()
    return {name: p.grad.clone() for name, p in named.named_parameters() if p.grad is not None}


def check_gradients(model: nn.Module, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert any("nara_core." in name for name in expected)
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < rounding_of(model), name


def compiled(model: nn.Module, how: str, backend: Any) -> nn.Module:
    if how == "torch.compile(model)":
        return torch.compile(model, backend=backend)  # type: ignore[return-value]
    model.compile(backend=backend)
    return model


def two_forwards(named: nn.Module, forward: Forward) -> Callable[[nn.Module], Forward]:
    """A function of a model that makes one output of two forwards, at two λ, before the backward pass."""

    def both(model: nn.Module) -> Forward:
        def run(_: nn.Module) -> Tensor:
            with noise_level(named, LEVELS[0]):
                first = forward(model)
            with noise_level(named, LEVELS[1]):
                return torch.cat([first, forward(model)])

        return run

    return both
