"""The canvas: a prompt, and right behind it `gen_length` masks that generation fills.

If prompts differ in length, each is followed by its own answer, and padding is on the right, as in
training. A model learns what follows an answer from the end tokens that training puts behind
answers, so both should reach equally far. A model that was trained on fewer end tokens continues
after its answer, or takes the length of the canvas for that of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nara_diffusion.training.loop import ShuffledStream
from nara_diffusion.utils.naming import counted

from .batches import AnswerCollator
from .models.backbone import Backbone
from .tokenizer import mask_in_a_text

_MAX_LENGTH = 512
_SAMPLE = 1000  # samples of the training stream that `trained_canvas` looks at


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
    """Put `gen_length` masks behind each prompt.

    An empty prompt becomes a BOS token if the model needs one.

    Args:
        input_ids: (b, p) prompts of any integer type.
        prompt_lengths: (b,), lengths of prompts that are padded on the right.
        attention_mask: (b, p), instead of them: 0 on padding, which may be on the right or left.

    Returns:
        (b, l) int64 token ids: prompt, masks, padding; l is the longest prompt + gen_length. (b,)
        where the answers start. (b, l) bool, False on padding.

    Raises:
        ValueError: shapes that don't agree, a canvas longer than the model's positions, a prompt
            that contains the mask token.
    """
    input_ids = input_ids.long()
    is_prompt = _prompt_positions(input_ids, prompt_lengths, attention_mask)  # (b, p)
    _check_mask_token(input_ids, is_prompt, mask_token_id)
    empty = ~is_prompt.any(1)  # (b,)
    opening = backbone.opening_token() if empty.any() else None
    if opening is not None:
        input_ids = F.pad(input_ids, (1, 0), value=opening)  # (b, 1 + p)
        is_prompt = torch.cat([empty[:, None], is_prompt], 1)
    starts = is_prompt.sum(1)  # (b,)
    longest_prompt = int(starts.max())
    check_canvas(backbone.model, longest_prompt, gen_length)
    length = longest_prompt + gen_length
    positions = torch.arange(length, device=input_ids.device)
    real = positions < starts[:, None] + gen_length  # (b, l)
    sequences = torch.full((len(input_ids), length), pad_token_id, device=input_ids.device)
    sequences[real] = mask_token_id
    # both sides run through the rows in order, and through the tokens of a row in order
    sequences[positions < starts[:, None]] = input_ids[is_prompt]
    return sequences, starts, real


def _prompt_positions(
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int] | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return which tokens belong to prompts, (b, p) bool."""
    if prompt_lengths is not None and attention_mask is not None:
        raise ValueError("prompt_lengths and attention_mask say the same: pass one of them")
    if attention_mask is not None:
        return attention_mask.bool()
    b, p = input_ids.shape
    given = p if prompt_lengths is None else prompt_lengths
    lengths = torch.as_tensor(given, device=input_ids.device).expand(b)
    if (lengths < 0).any() or (lengths > p).any():
        raise ValueError(
            f"prompt_lengths is {lengths.tolist()}, expected {b} lengths between 0 and {p}"
        )
    return torch.arange(p, device=input_ids.device) < lengths[:, None]


def _check_mask_token(input_ids: torch.Tensor, is_prompt: torch.Tensor, mask_token_id: int) -> None:
    """Raise ValueError if a prompt contains the mask token."""
    holding = (is_prompt & (input_ids == mask_token_id)).any(1)  # (b,)
    if holding.any():
        name = "the prompt" if len(input_ids) == 1 else f"prompt {int(holding.nonzero()[0])}"
        raise ValueError(f"{name} {mask_in_a_text(mask_token_id)}")


# ---------------------------------------------------------------- lengths


def check_positions(model: nn.Module, length: int, what: str, remedy: str) -> None:
    """Raise ValueError if `length` tokens exceed the model's positions.

    Args:
        what: the start of the message.
        remedy: its end.
    """
    limit = Backbone(model).position_limit
    if limit is not None and length > limit:
        raise ValueError(f"{what}, and the model has {limit} positions: {remedy}")


def check_canvas(model: nn.Module, longest_prompt: int, gen_length: int, record: str = "") -> None:
    """Raise ValueError if a canvas exceeds the model's positions.

    Args:
        record: what messages call the record with the longest prompt.
    """
    length = longest_prompt + gen_length
    left = (Backbone(model).position_limit or 0) - gen_length
    remedy = "lower gen_length, or take shorter prompts and conversations"
    if record and left > 0:
        remedy += (
            f" (the longest is {record}); --data_options max_prompt_length={left} leaves longer "
            "ones out"
        )
    what = f"the longest prompt has {longest_prompt} tokens and gen_length is {gen_length}"
    check_positions(model, length, f"{what}, together {length}", remedy)


def checked_lengths(model: nn.Module, max_length: int | None, gen_length: int) -> int:
    """Return the `max_length` of a training run; None is 512, or the model's positions if fewer.

    Raises:
        ValueError: one of both exceeds the model's positions.
    """
    what = f"gen_length is {gen_length}"
    remedy = "lower it, since prompt and answer share them"
    check_positions(model, gen_length + 1, what, remedy)
    if max_length is None:
        return min(_MAX_LENGTH, Backbone(model).position_limit or _MAX_LENGTH)
    remedy = "lower it; longer answers are cut"
    check_positions(model, max_length, f"max_length is {max_length}", remedy)
    return max_length


# ---------------------------------------------------------------- training and generation compared


def trained_canvas(
    stream: ShuffledStream, collator: AnswerCollator, gen_length: int, block_length: int
) -> tuple[str, list[str]]:
    """Compare the canvas that generation fills with what training shows of it.

    Args:
        stream: its first samples are looked at.

    Returns:
        One line for the run's facts. Warnings, if generation goes beyond what training shows, or
        ends before answers do.
    """
    rows = [stream[position] for position in range(min(len(stream.samples), _SAMPLE))]
    prompts = [row["prompt_length"] for row in rows]
    answers = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
    trained = collator.answer_lengths(rows)
    padding = f"(trained_padding {collator.trained_padding})"
    mean = round(sum(prompts + trained) / len(rows))
    fact = (
        f"prompts of {_span(prompts)} tokens, answers of {_span(answers)} tokens with their end, "
        f"trained to {_span(trained)} tokens {padding}, {mean} positions a sample; "
        f"generated: gen_length {gen_length} in {counted(gen_length // block_length, 'block')}"
    )
    short, long = [], []
    for row, answer, end in zip(rows, answers, trained, strict=True):
        is_whole = collator.is_whole(row)
        length = answer - is_whole  # without the end token
        if is_whole and end < gen_length:
            short.append(end)
        if row["instruction"] and length > gen_length:  # a text without a prompt may be longer
            long.append(length)
    warnings = []
    samples = counted(len(rows), "sample")
    if short:
        warnings.append(
            f"gen_length is {gen_length}, and {len(short)} of {samples} end before that, the "
            f"shortest after {min(short)} tokens {padding}: what follows an answer there is not "
            "trained, and generated answers can become worse than the base model's while the "
            "validation loss falls; give --trained_padding gen_length"
        )
    if long:
        warnings.append(
            f"gen_length is {gen_length}, and {len(long)} of {samples} have longer answers, up to "
            f"{max(long)} tokens: a generated answer is cut there, and exact match counts it as "
            f"wrong; give --gen_length {max(long)}"
        )
    return fact, warnings


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
