"""A model with three adapters, and its output by hand in float64."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from tests.helpers.adapted import TwoLayers, adapted, default_core, disturb, nara_config

LEVELS = torch.tensor([0.05, 0.5, 0.93])
TARGETS = ["first", "second"]


def three_adapters() -> PeftModel:
    """Of different rank, η, core and layers: "default" and "other" depend on λ, "plain" is a LoRA."""
    model = adapted(TwoLayers(), target_modules=TARGETS)
    model.add_adapter("other", nara_config(r=2, core_scale=0.3, target_modules=["first"], noise_embedding="mlp"))
    model.add_adapter("plain", nara_config(r=3, target_modules=["second"], core_type="identity"))
    disturb(model, seed=4)
    return model.eval()


def by_hand(model: PeftModel, x: Tensor, names: list[list[str]], levels: Tensor) -> Tensor:
    """The two layers in float64; `names` are the adapters of each sample."""
    rows = []
    for sample, adapters, level in zip(x.double(), names, levels, strict=True):
        h = sample
        for kind in TARGETS:
            layer = getattr(model.base_model.model, kind)
            W = layer.get_base_layer().weight.double()
            for name in adapters:
                if name in layer.lora_A:
                    config = model.peft_config[name]
                    C = torch.eye(config.r, dtype=torch.float64)
                    if config.core_type != "identity":
                        C = default_core(model, level[None], name)[0]
                    A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
                    W = W + 6 / config.r * B @ C @ A
            h = h @ W.T + layer.get_base_layer().bias.double()
            if kind == "first":
                h = torch.tanh(h)
        rows.append(h)
    return torch.stack(rows)
