"""λ as a token of the prompt: a cheap way to tell λ to a language model that unmasks texts."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.masking import MaskedBatch


def with_level_token(batch: MaskedBatch, digits: Sequence[int]) -> MaskedBatch:
    """Return `batch` with a token for λ after each prompt, which makes rows one token longer.

    Args:
        digits: the ids of ten tokens. Each row gets the token with index ⌊10 λ⌋.
    """
    b, length = batch.input_ids.shape
    place = (batch.answer.cumsum(1) == 0).sum(1, keepdim=True)  # (b, 1)
    places = torch.arange(length + 1, device=place.device).expand(b, -1)  # (b, l + 1)
    source = (places - (places > place).long()).clamp(max=length - 1)
    digit = (10 * batch.noise_level).long().clamp(max=9)  # (b,)
    level = torch.tensor(digits, device=place.device)[digit][:, None]  # (b, 1)
    parts = {}
    for name in ("input_ids", "targets", "masked", "answer", "attention_mask"):
        part = getattr(batch, name)
        if part is not None:
            parts[name] = part.gather(1, source)
    for name in ("input_ids", "targets"):
        parts[name] = parts[name].scatter(1, place, level)
    for name in ("masked", "answer"):
        parts[name] = parts[name].scatter(1, place, False)
    return replace(batch, **parts, places=None, opens=None)


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the ten digits. They are all equal if the tokenizer has no digits."""
    ids: Any = tokenizer(list(string.digits), add_special_tokens=False)["input_ids"]
    return [of_digit[-1] for of_digit in ids]
