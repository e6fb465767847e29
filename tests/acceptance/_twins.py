"""Two linear layers adapted by PEFT, and their output by hand in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from nara_diffusion import NaraConfig, noise_level
from tests.acceptance import _lives
from tests.helpers.rounding import rounding

LEVELS = torch.tensor([0.05, 0.5, 0.93])
PREFIX = "base_model.model."
X = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(3))


class Two(nn.Module):
    """Linear, tanh, Linear: (…, 7) → (…, 11) → (…, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def two(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Two()


def nara_config(**changes: Any) -> NaraConfig:
    return _lives.nara_config(**{"target_modules": ["first", "second"], **changes})


def lora_config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **changes})


def fill(model: nn.Module, name: str, seed: int) -> None:
    """Give all of an adapter other values, by the names of its file, so that no zero and no identity hides."""
    generator = torch.Generator().manual_seed(seed)
    of_adapter = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, adapter_name=name).values()}
    for key, parameter in model.named_parameters():
        if parameter.data_ptr() in of_adapter:
            noise = 0.4 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise.abs() + 0.5 if "magnitude" in key else noise)


def adapted(config: Any = None, seed: int = 1) -> PeftModel:
    model = get_peft_model(two(), nara_config() if config is None else config)
    fill(model, "default", seed)
    return model.eval()


def with_second(model: PeftModel | None = None, name: str = "other", **changes: Any) -> PeftModel:
    """With a second adapter, of another rank, of the first layer alone."""
    model = adapted() if model is None else model
    model.add_adapter(name, nara_config(**{"r": 3, "target_modules": ["first"], **changes}))
    fill(model, name, seed=4)
    return model.eval()


def run(model: nn.Module, levels: Any = LEVELS, x: Tensor = X, **options: Any) -> Tensor:
    with noise_level(model, levels), torch.no_grad():
        return model(x, **options)


def by_hand(
    model: PeftModel, adapters: Sequence[Sequence[str]], levels: Any = LEVELS, strengths: Any = None, x: Tensor = X
) -> Tensor:
    """y (b, …, 5) in float64; `adapters` names those of each sample, `strengths` holds {adapter: (b,)}."""
    rows = []
    states = {name: _state(model, name) for name in model.peft_config}
    base: Any = two()
    for i, level in enumerate(torch.as_tensor(levels).double().tolist()):
        weights = {name: getattr(base, name).weight.double() for name in ("first", "second")}
        for adapter in adapters[i]:
            factor = 1.0 if strengths is None else float(strengths[adapter][i])
            weights = {
                layer: _adapted_weight(weight, layer, model.peft_config[adapter], states[adapter], level, factor)
                for layer, weight in weights.items()
            }
        h = torch.einsum("oi,...i->...o", weights["first"], x[i].double()) + base.first.bias.double()
        rows.append(torch.einsum("oi,...i->...o", weights["second"], torch.tanh(h)) + base.second.bias.double())
    return torch.stack(rows)


def _state(model: PeftModel, name: str) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, adapter_name=name)
    return {key.removeprefix(PREFIX): tensor.detach().double() for key, tensor in state.items()}


def _adapted_weight(
    weight: Tensor, layer: str, config: Any, state: dict[str, Tensor], level: float, strength: float
) -> Tensor:
    A, B = state.get(f"{layer}.lora_A.weight"), state.get(f"{layer}.lora_B.weight")
    if A is None or B is None:
        return weight
    fields = {"core_type": "identity", **config.to_dict()}  # a LoRA's configuration names none
    own = {name.removeprefix("nara_core.shared."): tensor for name, tensor in state.items() if "nara_core" in name}
    core = strength * config.lora_alpha / config.r * _lives.core_by_hand(fields, own, level)
    whole = weight + torch.einsum("or,rq,qi->oi", B, core, A)
    if config.use_dora:
        whole = whole * (state[f"{layer}.lora_magnitude_vector"] / whole.norm(dim=1))[:, None]
    return whole


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= rounding(64, 12), error


def assert_far(actual: Tensor, other: Tensor) -> None:
    assert float((actual - other).detach().abs().flatten(1).amax(1).min()) > 1e-2
