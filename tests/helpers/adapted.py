"""Adapted models for the tests of the tuner, and the method's formulas by hand, in float64, from a state dict."""

from __future__ import annotations

import math
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
    """Linear, tanh, Linear: (…, 7) → (…, 11) → (…, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.second = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
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


def core_by_hand(
    state: dict[str, Tensor],
    prefix: str,
    config: NaraConfig,
    level: Tensor,
    density: Tensor | None = None,
) -> Tensor:
    """C (b, r, r) in float64 from the tensors under `prefix`; λ and the mask density are (b,)."""
    if config.core_type in ("rank_mask", "bins"):
        return mask_by_hand(config, level)
    own = {name.removeprefix(prefix): tensor.double() for name, tensor in state.items() if name.startswith(prefix)}
    if config.core_type == "constant":
        deviation = own["deviation"]
        core = torch.eye(len(deviation), dtype=torch.float64) + config.core_scale * deviation
        return core.expand(len(level), -1, -1)
    level = level.double()
    if config.core_type == "knots":
        return torch.stack([interpolated_by_hand(own["deviation"], config, value) for value in level.tolist()])
    chosen = {"noise_level": [level], "mask_density": [density], "both": [level, density]}[config.core_input]
    names = ["noise_level", "mask_density"] if config.core_input == "both" else [config.core_input]
    features = []
    for name, signal in zip(names, chosen, strict=True):
        assert signal is not None
        signal = signal.double()[:, None]
        if config.noise_embedding == "fourier":
            angle = signal * own[f"embeddings.{name}.frequencies"]
            features += [torch.sin(angle), torch.cos(angle)]
        elif config.noise_embedding == "mlp":
            weight = own[f"embeddings.{name}.projection.weight"]
            hidden = torch.einsum("bi,oi->bo", signal, weight) + own[f"embeddings.{name}.projection.bias"]
            features.append(hidden * torch.sigmoid(hidden))
        else:
            features.append(signal)
    h = torch.cat(features, dim=1)
    depth = len(config.core_hidden_dims)
    for index in range(depth + 1):
        h = torch.einsum("bi,oi->bo", h, own[f"layers.{index}.weight"]) + own[f"layers.{index}.bias"]
        if index < depth:
            h = h / (1 + torch.exp(-h))
    rank = math.isqrt(h.shape[1])
    assert rank * rank == h.shape[1]
    return torch.eye(rank, dtype=torch.float64) + config.core_scale * h.reshape(-1, rank, rank)


def mask_by_hand(config: NaraConfig, level: Tensor) -> Tensor:
    """The diagonals of T-LoRA and of Multi-LoRA, (b, r, r)."""
    core = torch.zeros(len(level), config.r, config.r, dtype=torch.float64)
    for sample, value in enumerate(level.tolist()):
        if config.core_type == "bins":
            size = config.r // config.core_bins
            first = size * min(math.floor(value * config.core_bins), config.core_bins - 1)
        else:
            least = config.rank_mask_min or config.r // 2
            first, size = 0, math.floor((config.r - least) * (1 - value)) + least
        for index in range(first, first + size):
            core[sample, index, index] = 1
    return core


def interpolated_by_hand(deviation: Tensor, config: NaraConfig, level: float) -> Tensor:
    """C (r, r) between the two knots beside λ."""
    place = level * (config.core_knots - 1)
    below = min(math.floor(place), config.core_knots - 2)
    between = (1 - (place - below)) * deviation[below] + (place - below) * deviation[below + 1]
    return torch.eye(config.r, dtype=torch.float64) + config.core_scale * between


def default_core(model: PeftModel, level: Tensor, adapter: str = "default", group: str = "shared") -> Tensor:
    """`core_by_hand` of a PeftModel's adapter."""
    config = model.peft_config[adapter]
    return core_by_hand(model.state_dict(), f"base_model.model.nara_core.cores.{adapter}.{group}.", config, level)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
