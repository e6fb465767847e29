"""Layers that get no rows, as an idle expert of a mixture does: forward and backward as through PEFT's LoRA."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, disturb, lora_config, nara_config
from tests.helpers.layers.beside_lora import LEVELS


def embedding() -> nn.Module:
    return nn.Embedding(13, 5)


LAYERS: dict[str, Any] = {
    "rows": (lambda: nn.Linear(7, 5), (0, 7)),
    "no bias": (lambda: nn.Linear(7, 5, bias=False), (0, 7)),
    "tokens": (lambda: nn.Linear(7, 5), (0, 4, 7)),
    "heads": (lambda: nn.Linear(7, 5), (0, 4, 2, 7)),
    "no tokens": (lambda: nn.Linear(7, 5), (3, 0, 7)),
    "convolution": (lambda: nn.Conv2d(7, 5, 3), (0, 7, 6, 4)),
    "embedding": (embedding, (0, 4)),
}
CASES = [
    pytest.param(make, shape, level, use_dora, id=f"{name}-{level_name}{'-DoRA' if use_dora else ''}")
    for name, (make, shape) in LAYERS.items()
    for level_name, level in {"one λ": 0.3, "a λ each": LEVELS}.items()
    for use_dora in (False, True)
    if not (use_dora and name == "embedding")
]


def gradients(model: Any, x: Tensor) -> dict[str, Tensor | None]:
    x = x.requires_grad_(x.is_floating_point())
    output = model(x)
    output.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "nara_core" not in name}
    return found | {"x": x.grad, "output": output.detach()}


@pytest.mark.parametrize(("make", "shape", "level", "use_dora"), CASES)
@pytest.mark.parametrize("fuses", [True, False], ids=["fused", "parts"])
def test_layers_without_rows_give_what_pefts_lora_gives(monkeypatch, make, shape, level, use_dora, fuses):
    models = []
    for config in (lora_config, nara_config):
        models.append(get_peft_model(OneLayer(make()), config(target_modules=["layer"], use_dora=use_dora)))
        disturb(models[-1])
    if not fuses:
        monkeypatch.setattr("nara_diffusion.layers.fused.MIN_ELEMENTS", math.inf)
    theirs, ours = models
    x = torch.zeros(shape, dtype=torch.long if make is embedding else torch.float32)
    expected = gradients(theirs, x.clone())
    with noise_level(ours, level):
        found = gradients(ours, x.clone())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        assert tensor is None or torch.equal(found[name], tensor), name


class Mixture(nn.Module):
    """Two experts, of which the second gets no row; the router's own layer sees the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.busy, self.idle = nn.Linear(7, 7), nn.Linear(7, 5), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.router(x)
        return self.busy(x) + self.idle(x.flatten(0, -2)[:0]).sum()


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_an_idle_expert_beside_layers_with_a_level_for_each_sample_gets_gradients_of_zero(use_dora):
    model: Any = get_peft_model(Mixture(), nara_config(target_modules=["router", "busy", "idle"], use_dora=use_dora))
    disturb(model)
    with noise_level(model, LEVELS):
        model(torch.randn(3, 4, 7)).square().sum().backward()
    layers = model.base_model.model
    for name, is_zero in (("router", False), ("busy", False), ("idle", True)):
        layer = getattr(layers, name)
        for factor in (layer.lora_A, layer.lora_B):
            gradient = factor["default"].weight.grad
            assert gradient is not None
            assert (gradient.count_nonzero() == 0) == is_zero, name
