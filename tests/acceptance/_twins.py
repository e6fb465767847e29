"""Two linear layers adapted by PEFT, and their output by hand in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig, noise_level
from tests.acceptance._by_hand import LEVELS, ByHand, leaves, tensors_of
from tests.helpers import adapted as tiny
from tests.helpers.adapted import TwoLayers, disturb

X = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(3))
LAYERS = ["first", "second"]


def two(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return TwoLayers()


def nara_config(**changes: Any) -> NaraConfig:
    return tiny.nara_config(**{"target_modules": LAYERS, **changes})


def lora_config(**changes: Any) -> LoraConfig:
    return tiny.lora_config(**{"target_modules": LAYERS, **changes})


def adapted(config: Any = None, seed: int = 1) -> PeftModel:
    model = get_peft_model(two(), nara_config() if config is None else config)
    disturb(model, seed=seed)
    return model.eval()


def with_second(model: PeftModel | None = None, **changes: Any) -> PeftModel:
    """With a second adapter, "other", of another rank, of the first layer alone."""
    model = adapted() if model is None else model
    model.add_adapter("other", nara_config(**{"r": 3, "target_modules": ["first"], **changes}))
    disturb(model, "other", seed=4)
    return model.eval()


def run(model: nn.Module, levels: Any = LEVELS, x: Tensor = X, **options: Any) -> Tensor:
    with noise_level(model, levels), torch.no_grad():
        return model(x, **options)


def by_hand(
    model: PeftModel, adapters: Sequence[Sequence[str]], levels: Any = LEVELS, strengths: Any = None, x: Tensor = X
) -> Tensor:
    """y (b, …, 5) in float64; `adapters` names those of each sample, `strengths` holds {adapter: (b,)}."""
    base, levels, rows = ByHand(two()), torch.as_tensor(levels).double(), []
    tensors = {name: leaves(tensors_of(model, name)) for name in model.peft_config}
    for i, names in enumerate(adapters):
        h = x[i : i + 1].double()
        for layer in LAYERS:
            plain = weight = base.layers[layer].weight
            for name in [name for name in names if f"{layer}.lora_A.weight" in tensors[name]]:
                config: Any = model.peft_config[name]
                scaling = config.lora_alpha / config.r * (1 if strengths is None else float(strengths[name][i]))
                weight = weight + base.weights(layer, config, tensors[name], levels[i : i + 1], scaling=scaling) - plain
            h = base.output(layer, weight.view(1, *plain.shape), h)
            h = torch.tanh(h) if layer == "first" else h
        rows.append(h)
    return torch.cat(rows)
