"""The longest sequence that a model can read.

A table of learned positions has no row for a position beyond its end. Rotary positions have no end, but a model that
never saw positions beyond `max_position_embeddings` predicts badly there.
"""

from __future__ import annotations

import logging

from torch import nn

from .lm_head import configured
from .virtual_tokens import virtual_tokens

logger = logging.getLogger(__name__)


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence that the model's position embeddings can tell apart; None if unknown."""
    # tables can have more rows, which are no positions (RoBERTa, Nyströmformer)
    limits = [limit for limit in (_table(model), configured(model, "max_position_embeddings")) if limit is not None]
    return min(limits) - virtual_tokens(model) if limits else None


def check_positions(model: nn.Module, max_length: int, *, longest: int = 0) -> None:
    """Refuse a `max_length` beyond a table of learned positions, and warn of samples beyond rotary positions.

    Args:
        max_length: the most tokens of a sample.
        longest: the tokens of the longest sample.

    Raises:
        ValueError: with what was given, the limit and the remedy.
    """
    limit = position_limit(model)
    if limit is None:
        return
    if _table(model) is not None and max_length > limit:
        virtual = virtual_tokens(model)
        taken = f" ({virtual} more are the adapter's virtual tokens)" if virtual else ""
        raise ValueError(
            f"max_length is {max_length}, and the model has a table of {limit} positions{taken}: lower it to that, "
            f"--max_length {limit}"
        )
    if longest > limit:
        logger.warning(
            "samples have up to %d tokens, and the model knows %d positions: what it makes of those beyond is worse, "
            "and neither `generate` nor nara-eval goes there. --max_length %d cuts the samples; to train on them "
            "whole, raise max_position_embeddings, and the rope parameters with it, in the model's config.json",
            *(longest, limit, limit),
        )


def check_canvas(model: nn.Module, longest_prompt: int, gen_length: int) -> None:
    """Refuse a canvas, prompt and `gen_length` tokens after it, beyond the positions that the model can tell apart.

    Raises:
        ValueError: with what was given, and the limit.
    """
    limit, length = position_limit(model), longest_prompt + gen_length
    if limit is not None and length > limit:
        raise ValueError(
            f"the longest prompt has {longest_prompt} tokens and gen_length is {gen_length}, together {length}, and "
            f"the model has {limit} positions: lower --gen_length, or leave out the records with long prompts"
        )


def _table(model: nn.Module) -> int | None:
    """The number of positions in the model's table of learned positions; None if it has none."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            return module.num_embeddings - reserved
    return None
