"""The canvas: a prompt, and `gen_length` masks right behind it that generation fills.

Prompts of unequal length are each followed by their own answer, and padding stands on the right, as in training. How
far training shows it: `data.collator`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .models.backbone import Backbone

_MAX_LENGTH = 512


def place_prompts(
    backbone: Backbone,
    input_ids: torch.Tensor,
    gen_length: int,
    mask_token_id: int,
    pad_token_id: int,
    *,
    prompt_lengths: torch.Tensor | Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put `gen_length` masks behind each prompt; an empty one becomes a BOS token where the model needs one.

    Args:
        input_ids: (b, p) prompts of any integer type.
        prompt_lengths: (b,), lengths of prompts that are padded on the right.
        attention_mask: (b, p), instead of them: 0 on padding, which may stand on the right or on the left.

    Returns:
        (b, l) int64 token ids, prompt, masks, padding, l being the longest prompt + gen_length; (b,) where the answers
        start; and (b, l) bool, False on padding.

    Raises:
        ValueError: shapes that don't agree, a canvas longer than the model's positions, a prompt that holds the mask
            token.
    """
    b, p = input_ids.shape
    device, input_ids = input_ids.device, input_ids.long()
    if prompt_lengths is not None and attention_mask is not None:
        raise ValueError("prompt_lengths and attention_mask say the same: pass one of them")
    lengths = torch.as_tensor(p if prompt_lengths is None else prompt_lengths, device=device).expand(b)
    if (lengths < 0).any() or (lengths > p).any():
        raise ValueError(f"prompt_lengths is {lengths.tolist()}, expected {b} lengths between 0 and {p}")
    is_prompt = torch.arange(p, device=device) < lengths[:, None] if attention_mask is None else attention_mask.bool()
    holding = (is_prompt & (input_ids == mask_token_id)).any(1)
    if holding.any():
        name = "the prompt" if b == 1 else f"prompt {int(holding.nonzero()[0])}"
        raise ValueError(f"{name} {mask_in_a_text(mask_token_id)}")
    empty = ~is_prompt.any(1)  # (b,)
    opening = backbone.opening_token() if empty.any() else None
    if opening is not None:
        input_ids = F.pad(input_ids, (1, 0), value=opening)  # (b, 1 + p)
        is_prompt = torch.cat([empty[:, None], is_prompt], 1)
    starts = is_prompt.sum(1)  # (b,)
    longest = int(starts.max()) + gen_length
    check_canvas(backbone.model, longest - gen_length, gen_length)
    positions = torch.arange(longest, device=device)
    real = positions < starts[:, None] + gen_length
    sequences = torch.full((b, longest), pad_token_id, device=device)
    sequences[real] = mask_token_id
    sequences[positions < starts[:, None]] = input_ids[is_prompt]  # both run through rows in order, and tokens in order
    return sequences, starts, real


def mask_in_a_text(mask_token_id: int) -> str:
    """What is said of a text in which the mask token was typed, or is found among its ids, after the text's name."""
    return (
        f"holds the mask token ({mask_token_id}), and the model would take it for a token that is masked: write it "
        "otherwise, or leave it out"
    )


def check_positions(model: nn.Module, length: int, what: str, remedy: str) -> None:
    """Refuse a text of `length` tokens that is longer than the positions that `model` knows.

    Raises:
        ValueError: `what`, the limit, and the `remedy`.
    """
    limit = Backbone(model).position_limit
    if limit is not None and length > limit:
        raise ValueError(f"{what}, and the model has {limit} positions: {remedy}")


def check_canvas(model: nn.Module, longest_prompt: int, gen_length: int, record: str = "") -> None:
    """Refuse a canvas beyond the model's positions; see `check_positions`. `record` names the longest prompt's."""
    length = longest_prompt + gen_length
    what = f"the longest prompt has {longest_prompt} tokens and gen_length is {gen_length}, together {length}"
    remedy = "lower gen_length, or take shorter prompts and conversations"
    limit = Backbone(model).position_limit
    if record and limit is not None and limit > gen_length:
        remedy += (
            f" (the longest is {record}); --data_options max_prompt_length={limit - gen_length} leaves longer ones out"
        )
    check_positions(model, length, what, remedy)


def checked_lengths(model: nn.Module, max_length: int | None, gen_length: int) -> int:
    """`max_length` of a training run; None is 512, or as many as the model has positions.

    Raises:
        ValueError: one of both is beyond the model's positions.
    """
    check_positions(model, gen_length + 1, f"gen_length is {gen_length}", "lower it, prompt and answer share them")
    if max_length is None:
        return min(_MAX_LENGTH, Backbone(model).position_limit or _MAX_LENGTH)
    check_positions(model, max_length, f"max_length is {max_length}", "lower it, longer answers are cut")
    return max_length
