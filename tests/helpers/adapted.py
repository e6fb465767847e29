"""Adapted models for the tests of the tuner."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from tests.acceptance._by_hand import core_by_hand


class OneLayer(nn.Module):
    """A model that is a single layer, called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TwoLayers(nn.Module):
    """Linear, tanh, Linear: (…, 7) → (…, 11) → (…, 5), with a timestep that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.second = nn.Linear(11, 5)

    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def nara_config(**changes: Any) -> NaraConfig:
    """A small configuration with alpha != r, whose core is far from I once it has been disturbed."""
    options = {"r": 4, "lora_alpha": 6, "core_scale": 0.7, "core_hidden_dims": (9, 10), "noise_embedding_dim": 8}
    return NaraConfig(**{**options, **changes})


def lora_config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **changes})


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Overwrite everything that training could have changed in the adapters, so that no zero or identity hides."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "nara_core." in name or "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
            if "lora_magnitude_vector" in name:
                noise = noise.abs() + 0.5
            parameter.data.copy_(noise)


def adapted(model: nn.Module, **changes: Any) -> PeftModel:
    """`model` with one NaRA adapter, disturbed, in evaluation mode."""
    peft_model = get_peft_model(model, nara_config(**changes))
    disturb(peft_model)
    return peft_model.eval()


def default_core(model: PeftModel, level: Tensor, adapter: str = "default", group: str = "shared") -> Tensor:
    """C (b, r, r) of a PeftModel's adapter by hand, in float64, from its state dict."""
    config, prefix = model.peft_config[adapter], f"base_model.model.nara_core.cores.{adapter}.{group}."
    state = {name.removeprefix(prefix): t.double() for name, t in model.state_dict().items() if name.startswith(prefix)}
    return core_by_hand(config, state, level, config.r)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
