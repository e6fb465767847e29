"""Prompts of unequal length, each followed by its own answer: prompt, answer, padding on the right, as in training.

A prompt in which the mask token was typed is refused: what the model reads as masked has to be what λ counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Canvas:
    """Attributes:
    sequences: (b, l) int64 token ids: prompt, masks, padding; l is the longest prompt + gen_length.
    starts: (b,) where the answers start.
    real: (b, l) bool, False on padding.
    """

    sequences: torch.Tensor
    starts: torch.Tensor
    real: torch.Tensor


def place_prompts(
    input_ids: torch.Tensor,
    *,
    gen_length: int,
    mask_token_id: int,
    pad_token_id: int,
    prompt_lengths: torch.Tensor | Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    opening_token: Callable[[], int | None] = lambda: None,
    max_length: int | None = None,
) -> Canvas:
    """Put `gen_length` masks behind each prompt.

    Args:
        input_ids: (b, p) prompts of any integer type, of p tokens each unless `prompt_lengths` or `attention_mask` says
            otherwise.
        prompt_lengths: (b,), lengths of prompts that are padded on the right.
        attention_mask: (b, p), 0 on padding, which may stand on the right or on the left.
        opening_token: returns the token that an empty prompt is replaced by, or None; called if there is one.
        max_length: the number of positions that the model has.

    Raises:
        ValueError: shapes that don't agree, an empty batch, a prompt and answer longer than the model can see, a prompt
            that holds the mask token.
    """
    is_integer = not input_ids.is_floating_point() and input_ids.dtype != torch.bool
    if input_ids.ndim != 2 or input_ids.shape[0] == 0 or not is_integer:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and {input_ids.dtype}, expected (b, p) token ids"
        )
    device, input_ids = input_ids.device, input_ids.long()
    kept = _kept(input_ids, prompt_lengths, attention_mask)  # (b, p)
    for row, (tokens, real) in enumerate(zip(input_ids, kept, strict=True)):
        name = "the prompt" if len(input_ids) == 1 else f"prompt {row}"
        check_without_mask(tokens[real].tolist(), mask_token_id, name)
    empty = ~kept.any(1)  # (b,)
    opening = opening_token() if empty.any() else None
    if opening is not None:
        input_ids = F.pad(input_ids, (1, 0), value=opening)  # (b, 1 + p)
        kept = torch.cat([empty[:, None], kept], 1)
    starts = kept.sum(1)  # (b,)
    longest = int(starts.max()) + gen_length
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"the longest prompt has {longest - gen_length} tokens and gen_length is {gen_length}, together {longest}, "
            f"and the model has {max_length} positions: shorten one of them"
        )
    positions = torch.arange(longest, device=device)
    in_answer = (positions >= starts[:, None]) & (positions < starts[:, None] + gen_length)
    sequences = torch.full((input_ids.shape[0], longest), pad_token_id, device=device, dtype=input_ids.dtype)
    sequences[positions < starts[:, None]] = input_ids[kept]  # both run through rows in order, and tokens in order
    sequences[in_answer] = mask_token_id
    return Canvas(sequences, starts, positions < starts[:, None] + gen_length)


def check_without_mask(token_ids: Sequence[int], mask_token_id: int | None, name: str) -> None:
    """Refuse a text that holds the mask token; `name` is the text's in the message.

    Raises:
        ValueError: it does.
    """
    if mask_token_id in token_ids:
        raise ValueError(
            f"{name} holds the mask token ({mask_token_id}), and the model would take it for a token that is masked: "
            "write it otherwise, or leave it out"
        )


def _kept(
    input_ids: torch.Tensor, prompt_lengths: torch.Tensor | Sequence[int] | None, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    b, p = input_ids.shape
    if prompt_lengths is not None and attention_mask is not None:
        raise ValueError("prompt_lengths and attention_mask say the same: pass one of them")
    if attention_mask is not None:
        if attention_mask.shape != (b, p):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {(b, p)}: they have to agree"
            )
        return attention_mask.bool()
    if prompt_lengths is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    lengths = torch.as_tensor(prompt_lengths, device=input_ids.device)
    if lengths.shape != (b,) or (lengths < 0).any() or (lengths > p).any():
        raise ValueError(f"prompt_lengths is {lengths.tolist()}, expected {b} lengths between 0 and {p}")
    return torch.arange(p, device=input_ids.device) < lengths[:, None]
