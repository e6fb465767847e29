"""The methods that are compared, each a name and the adapter that it stands for."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from nara_diffusion import NaraConfig
from quality.recipe import Recipe

FULL = "full"
METHODS: dict[str, dict[str, Any]] = {
    FULL: {},
    "lora": {},
    "dora": {"use_dora": True},
    "nara": {},
    "nara_dora": {"use_dora": True},
    "nara_c": {"core_type": "constant"},
    "multi_lora": {"core_type": "bins"},
    "tlora": {"core_type": "rank_mask"},
}
PLAIN = ("lora", "dora")
BINS = 5  # of Multi-LoRA


def build(model: nn.Module, method: str, recipe: Recipe) -> nn.Module:
    """`model` with the adapter of `method`; what is trained has requires_grad."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if method == FULL:
        return model.requires_grad_(True)
    rank = recipe.rank * (BINS if method == "multi_lora" else 1)
    kind = LoraConfig if method in PLAIN else NaraConfig
    fields = {"r": rank, "lora_alpha": rank, "target_modules": recipe.target_modules}
    return get_peft_model(model, kind(**fields | METHODS[method] | recipe.adapter))
