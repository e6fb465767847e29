"""PiSSA's adapter as a LoRA of twice the rank, for the base model as everybody has it.

PiSSA (arXiv 2404.02948) and OLoRA take the start s·B₀·A₀ out of the base weights: W = W_res + s·B₀·A₀. What has been
trained is then an update of W_res, and no other copy of the base model has that. As an update of W it is

    W_res + s·B·A − W  =  s·B·A − s·B₀·A₀  =  s · [B, −B₀] · [A; A₀]
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from nara_diffusion.config import changes_base as init_changes_base


def changes_base(model: nn.Module) -> bool:
    """Whether `model` has lost its base weights: all are trained, or an initialisation has subtracted s·B₀·A₀."""
    config = getattr(model, "peft_config", {}).get("default")
    return config is None or takes_start_from_base(config)


def takes_start_from_base(config: Any) -> bool:
    """Whether an adapter of this configuration changes the base weights when it is added."""
    return init_changes_base(getattr(config, "init_lora_weights", None))


def remember_start(model: nn.Module) -> None:
    """Keep A₀ and B₀ of a LoRA that was just added to `model`, if it has changed the base weights."""
    config = getattr(model, "peft_config", {}).get("default")
    if isinstance(config, LoraConfig) and not isinstance(config, NaraConfig) and takes_start_from_base(config):
        start = {key: value.detach().clone().cpu() for key, value in _factors(model).items()}
        model.start_factors = start  # type: ignore[assignment]


def as_lora(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and tensors of `model`'s adapter for the unchanged base model.

    Args:
        tensors: those of the adapter, by the names of `get_peft_model_state_dict`.
    """
    start: dict[str, Tensor] | None = getattr(model, "start_factors", None)
    if start is None:
        return config, tensors
    wider = dict(tensors)
    for key, first in start.items():
        now = tensors[key].cpu()
        is_a = "lora_A" in key
        wider[key] = torch.cat([now, first.to(now.dtype) if is_a else -first.to(now.dtype)], dim=0 if is_a else 1)
    return _of_twice_the_rank(config), wider


def _factors(model: nn.Module) -> dict[str, Tensor]:
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: value for key, value in tensors.items() if "lora_A" in key or "lora_B" in key}


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The configuration with twice the rank and the same scale lora_alpha / r, or lora_alpha / √r."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config = copy(config)
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, factor * config.lora_alpha, True  # type: ignore[assignment]
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}  # type: ignore[assignment]
    return config
