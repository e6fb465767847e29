"""Prompt tuning and P-tuning: PEFT puts virtual tokens before a text, and the model has an output for each of them.

    n virtual tokens, then the l tokens of the text   →   hidden states and logits (b, n + l, …)

Losses and samplers count positions in the text, so the first n are dropped where the two meet.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn


def virtual_tokens(model: nn.Module) -> int:
    """The number of virtual tokens that an adapter of PEFT puts before each text; 0 if `model` has no such adapter."""
    for module in model.modules():
        if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
            return int(module.active_peft_config.num_virtual_tokens)  # type: ignore[attr-defined]
    return 0


def of_text(model: nn.Module, states: torch.Tensor, length: int) -> torch.Tensor:
    """The part (b, l, …) of `states` (b, n + l, …) or (b, l, …) that belongs to the text of `length` l.

    n = 0 where the model's adapter is disabled.

    Raises:
        ValueError: the states have another number of positions.
    """
    extra = states.shape[1] - length
    if extra == 0:
        return states
    if extra != virtual_tokens(model):
        raise ValueError(
            f"{type(model).__name__} returned {states.shape[1]} positions for {length} tokens, of which "
            f"{virtual_tokens(model)} are virtual: expected {length + virtual_tokens(model)}."
        )
    return states[:, extra:]
