"""Small models, a NaRA on them that has moved far from its start, and how far two outputs lie apart."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig


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
    core = {"core_scale": 0.7, "core_hidden_dims": (9, 10), "noise_embedding_dim": 8, "fourier_scale": 2.0}
    return NaraConfig(**{"r": 4, "lora_alpha": 6, **core, **changes})


def lora_config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **changes})


def disturb(model: nn.Module, adapter: str = "", seed: int = 1, *, scale: float = 0.4) -> None:
    """Overwrite all that training could have changed in one adapter, or in all, so that no zero or identity hides."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_its_own = not adapter or adapter in name.split(".")
        if is_its_own and any(part in name for part in ("lora_", "modules_to_save")):
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise.abs() + 0.5 if "lora_magnitude_vector" in name else noise)


def adapted(model: nn.Module, **changes: Any) -> PeftModel:
    """`model` with one NaRA adapter, disturbed, in evaluation mode."""
    peft_model = get_peft_model(model, nara_config(**changes))
    disturb(peft_model)
    return peft_model.eval()


def exact_core(model: PeftModel, level: Tensor) -> Tensor:
    """C = I + D (b, r, r) in float64 with the D that layers get, which float32 would round beside I."""
    (D,) = (core.at(level) for core in model.base_model.model.lora_core.cores["default"].children())
    return torch.eye(D.shape[-1], dtype=torch.float64) + D.double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).abs().max())
    return error / float(expected.abs().max()) if error else 0.0
