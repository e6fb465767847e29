"""Two adapted layers: their output without gradients, and the same by hand in float64."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.helpers.adapted import TwoLayers, adapted, default_core

TARGETS = ["first", "second"]
LEVELS = torch.tensor([0.05, 0.5, 0.93])


@pytest.fixture
def model() -> PeftModel:
    """A NaRA on both layers, disturbed."""
    return adapted(TwoLayers(), target_modules=TARGETS)


@pytest.fixture
def x() -> Tensor:
    """(3, 7)"""
    return torch.randn(3, 7)


def parts_in_turn(model: PeftModel, x: Tensor) -> Tensor:
    """The output of the two layers, called by themselves."""
    root = model.base_model.model
    return root.second(torch.tanh(root.first(x)))


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def by_hand(model: PeftModel, x: Tensor, core: Tensor) -> Tensor:
    """The output of a TwoLayers in float64, from its state dict and C (b, r, r)."""
    state = {name.removeprefix("base_model.model."): t.double() for name, t in model.state_dict().items()}
    scaling = 6 / 4

    def layer(name: str, x: Tensor) -> Tensor:
        A, B = (state[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
        base = x @ state[f"{name}.base_layer.weight"].T + state[f"{name}.base_layer.bias"]
        return base + scaling * torch.einsum("or,brs,si,bi->bo", B, core, A, x)

    return layer("second", torch.tanh(layer("first", x.double())))


def expect(model: PeftModel, x: Tensor, level: float | Tensor) -> Tensor:
    levels = torch.as_tensor(level, dtype=torch.float32).expand(len(x))
    return by_hand(model, x, default_core(model, levels))
