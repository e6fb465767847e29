"""Encoding of prompts that are longer than CLIP's 77 tokens, in n chunks of 75 tokens.

    tokens → n × [begin, 75 tokens, end], the last ones padded → CLIP, chunk by chunk → (b, n, 77, d)
    → begin of the first, 75 states of each, end of the last → (b, 2 + 75 n, d)

A chunk without tokens is encoded as the empty prompt. With n = 1 this is CLIP's usual encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .clip import encode_tokens

PLACES = 77
CHUNK = PLACES - 2


def is_long(length: int | None) -> bool:
    """Whether `length` is another number of tokens than CLIP's 77; None stands for 77."""
    return length is not None and length != PLACES


def check_length(length: int, title: str = "CLIP") -> None:
    """Raises ValueError, with the nearest numbers, if `length` (with begin and end) isn't 2 + 75 n."""
    below = max(0, (length - 2) // CHUNK)
    if below and length == 2 + CHUNK * below:
        return
    nearest = " and ".join(str(2 + CHUNK * count) for count in (below, below + 1) if count)
    raise ValueError(
        f"max_sequence_length is {length}, but {title} reads prompts in chunks of {CHUNK} tokens, with a begin and an "
        f"end: expected {PLACES} or 2 + {CHUNK} n; nearest: {nearest}."
    )


def check_places(tokenizers: Sequence[Any], length: int) -> None:
    """Raises ValueError if a tokenizer reads another number of tokens than 77."""
    for tokenizer in tokenizers:
        if tokenizer.model_max_length != PLACES:
            raise ValueError(
                f"max_sequence_length is {length}, but this model's CLIP reads {tokenizer.model_max_length} tokens, "
                f"and chunks are made for those that read {PLACES}: leave it out."
            )


def tokenize_chunks(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids (b, n, 77) of prompts (b), truncated to 75 n tokens; `length` is 2 + 75 n."""
    tokens = tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False).input_ids
    chunks = [[ids[start : start + CHUNK] for start in range(0, length - 2, CHUNK)] for ids in tokens]
    return torch.tensor([[_between_ends(tokenizer, chunk) for chunk in row] for row in chunks])


def _between_ends(tokenizer: Any, tokens: list[int]) -> list[int]:
    padding = [tokenizer.pad_token_id] * (CHUNK - len(tokens))
    return [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *padding]


def join_chunks(states: Tensor) -> Tensor:
    """(b, n, 77, d) → (b, 2 + 75 n, d): without the begin and end tokens between chunks."""
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)


def encode_long_prompts(
    tokenizers: Sequence[Any],
    text_encoders: Sequence[Any],
    prompts: Sequence[str],
    length: int,
    clip_skip: int | None = None,
) -> tuple[Tensor, ...]:
    """The states (b, length, d) of prompts (b), on the encoders' device.

    With one encoder (Stable Diffusion 1 and 2) these are its last states. With two (SDXL) they are those of
    `encode_tokens`, concatenated, and the pooled state (b, p) of the first chunk is returned too.

    Args:
        tokenizers: of the pipeline, in its order.
        text_encoders: those of the tokenizers.
        length: 2 + 75 n; 77 is the pipelines' own encoding.
        clip_skip: with two encoders, the number of last layers to skip.

    Raises:
        ValueError: another length, tokenizers that don't read 77 tokens, or `clip_skip` with one encoder.
    """
    check_length(length)
    check_places(tokenizers, length)
    ids = [tokenize_chunks(tokenizer, prompts, length).flatten(0, 1) for tokenizer in tokenizers]  # (b n, 77)
    chunks = (len(prompts), (length - 2) // CHUNK)
    if len(text_encoders) > 1:
        states, pooled = encode_tokens(text_encoders, ids, clip_skip)
        return join_chunks(states.unflatten(0, chunks)), pooled.unflatten(0, chunks)[:, 0]
    if clip_skip is not None:
        raise ValueError(f"clip_skip is {clip_skip}, but of one text encoder the last states are read: leave it out.")
    (encoder,) = text_encoders
    return (join_chunks(encoder(ids[0].to(encoder.device))[0].unflatten(0, chunks)),)


@torch.no_grad()
def long_prompt_call(
    pipe: Any,
    prompts: Sequence[str],
    length: int,
    *,
    negative_prompts: Sequence[str] | None = None,
    guidance_scale: float | None = None,
    clip_skip: int | None = None,
) -> dict[str, Tensor]:
    """Arguments in place of `prompt` for pipelines of Stable Diffusion 1, 2 or XL, which truncate it to 77 tokens:

        pipe(**long_prompt_call(pipe, [prompt], 227), num_inference_steps=30).images

    Args:
        prompts: (b).
        length: as in `encode_long_prompts`.
        negative_prompts: (b); None means the pipeline's default: the empty prompt, or zeros.
        guidance_scale: of the call; at 1 or less, no negative prompts are encoded.
        clip_skip: for the prompts; as in the pipelines, negative prompts are encoded with all layers.
    """
    names = [suffix for suffix in ("", "_2") if getattr(pipe, f"text_encoder{suffix}", None) is not None]
    tokenizers, encoders = (
        [getattr(pipe, part + suffix) for suffix in names] for part in ("tokenizer", "text_encoder")
    )
    embeddings = encode_long_prompts(tokenizers, encoders, prompts, length, clip_skip)
    call: dict[str, Tensor] = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), embeddings, strict=False))
    if guidance_scale is not None and guidance_scale <= 1:
        return call
    if negative_prompts is None and pipe.config.get("force_zeros_for_empty_prompt"):
        return call | {f"negative_{name}": torch.zeros_like(part) for name, part in call.items()}
    negatives = [""] * len(prompts) if negative_prompts is None else negative_prompts
    encoded = encode_long_prompts(tokenizers, encoders, negatives, length)
    return call | {f"negative_{name}": part for name, part in zip(call, encoded, strict=True)}
