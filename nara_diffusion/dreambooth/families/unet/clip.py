"""Encoding of prompts by CLIP, as in Stable Diffusion's pipelines, with gradients if its weights require them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tokenize_prompts(tokenizers: Sequence[Any], prompts: Sequence[str]) -> list[Tensor]:
    """Token ids (b, 77) of each tokenizer, padded and truncated as in the pipelines."""
    return [
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in tokenizers
    ]


def encode_tokens(
    text_encoders: Sequence[Any], token_ids: Sequence[Tensor], clip_skip: int | None = None
) -> tuple[Tensor, Tensor]:
    """(prompt_embeds (b, 77, d_1 + d_2), pooled (b, p)) of each encoder's token ids (b, 77), on the encoders' device.

    prompt_embeds are the hidden states before the last layer, or `clip_skip` layers earlier, concatenated; pooled is
    the projected end-of-text state of the last encoder.
    """
    states, pooled = [], None
    for encoder, ids in zip(text_encoders, token_ids, strict=True):
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2 - (clip_skip or 0)])
        pooled = output[0]  # of the last encoder: text_embeds
    assert pooled is not None
    return torch.cat(states, dim=-1), pooled


def encode_prompts(
    tokenizers: Sequence[Any], text_encoders: Sequence[Any], prompts: Sequence[str], clip_skip: int | None = None
) -> tuple[Tensor, Tensor]:
    """`encode_tokens` of prompts (b)."""
    return encode_tokens(text_encoders, tokenize_prompts(tokenizers, prompts), clip_skip)


def check_clip_skip(clip_skip: int | None, text_encoders: Sequence[Any]) -> None:
    """Raises ValueError if `clip_skip` leaves no layer of an encoder."""
    most = min(encoder.config.num_hidden_layers for encoder in text_encoders) - 1
    if clip_skip is not None and clip_skip > most:
        raise ValueError(f"clip_skip is {clip_skip}, but at most {most} layers of this model's CLIP can be skipped.")
