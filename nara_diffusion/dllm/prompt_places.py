"""Put masks after prompts of unequal length, which is the canvas of generation.

The lengths of texts are compared with the positions that a model has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .models.backbone import Backbone
from .tokenizer import mask_in_a_text

_MAX_LENGTH = 512


def check_positions(model: nn.Module, length: int, what: str, remedy: str) -> None:
    """Raise ValueError if `length` tokens exceed the model's positions: `what`, …: `remedy`."""
    limit = Backbone(model).position_limit
    if limit is not None and length > limit:
        raise ValueError(f"{what}, but the model has {limit} positions: {remedy}")


def check_canvas(model: nn.Module, longest_prompt: int, gen_length: int, record: str = "") -> None:
    """Raise ValueError if a canvas exceeds the model's positions.

    Args:
        record: the name of the record with the longest prompt, for messages.
    """
    length = longest_prompt + gen_length
    left = (Backbone(model).position_limit or 0) - gen_length
    remedy = "lower gen_length, or take shorter prompts and conversations"
    if record and left > 0:
        remedy += f" (the longest is {record}); --max_prompt_length {left} leaves longer ones out"
    lengths = f"the longest prompt has {longest_prompt} tokens and gen_length is {gen_length}"
    check_positions(model, length, f"{lengths}, together {length}", remedy)


def checked_lengths(model: nn.Module, max_length: int | None, gen_length: int) -> int:
    """Return the `max_length` of a training run.

    The default is 512, or the number of the model's positions if there are fewer.

    Raises:
        ValueError: `max_length` or `gen_length` exceeds the model's positions.
    """
    check_positions(
        model,
        gen_length + 1,
        f"gen_length is {gen_length}",
        "lower it, since prompt and answer share them",
    )
    if max_length is None:
        return min(_MAX_LENGTH, Backbone(model).position_limit or _MAX_LENGTH)
    check_positions(
        model, max_length, f"max_length is {max_length}", "lower it; longer answers are cut"
    )
    return max_length


def place_prompts(
    backbone: Backbone,
    input_ids: Tensor,
    gen_length: int,
    mask_token_id: int,
    pad_token_id: int,
    *,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put `gen_length` masks after each prompt.

    Everything is checked and placed on the CPU, and then moved to the device of `input_ids`.

    The arguments are those of `generate`.

    Returns:
        The token ids (b, l) int64 of prompt, masks and padding, with l the longest prompt +
        gen_length. The starts (b,) of the answers. The attention mask (b, l) int64, 0 on padding,
        or None if nothing is padded.

    Raises:
        ValueError: the shapes don't agree, the canvas is longer than the model's positions, a
            prompt contains the mask token, or one is empty and the model predicts the next token.
    """
    device = input_ids.device
    input_ids = input_ids.cpu().long()
    is_prompt = prompt_positions(input_ids, prompt_lengths, attention_mask)  # (b, p)
    has_mask = (is_prompt & (input_ids == mask_token_id)).any(1)  # (b,)
    if has_mask.any():
        name = "the prompt" if len(input_ids) == 1 else f"prompt {int(has_mask.nonzero()[0])}"
        raise ValueError(f"{name} {mask_in_a_text(mask_token_id)}")
    if backbone.is_shifted and not is_prompt.any(1).all():
        raise ValueError(
            "there is an empty prompt, and this model predicts the next token, so nothing predicts "
            "the first one: begin the prompt with a BOS token"
        )
    starts = is_prompt.sum(1)  # (b,)
    longest_prompt = int(starts.max())
    check_canvas(backbone.model, longest_prompt, gen_length)
    length = longest_prompt + gen_length
    positions = torch.arange(length)
    real = positions < starts[:, None] + gen_length  # (b, l)
    sequences = torch.full((len(input_ids), length), pad_token_id)
    sequences[real] = mask_token_id
    # both sides go through the rows in order, and through the tokens of each row in order
    sequences[positions < starts[:, None]] = input_ids[is_prompt]
    padding = None if real.all() else real.long().to(device, non_blocking=True)
    sequences = sequences.to(device, non_blocking=True)
    return sequences, starts.to(device, non_blocking=True), padding


def prompt_positions(
    input_ids: Tensor,
    prompt_lengths: Tensor | Sequence[int] | None,
    attention_mask: Tensor | None,
) -> Tensor:
    """Return the mask (b, p) bool, on the CPU, of tokens that belong to prompts."""
    if prompt_lengths is not None and attention_mask is not None:
        raise ValueError("prompt_lengths and attention_mask say the same: pass one of them")
    if attention_mask is not None:
        return attention_mask.cpu().bool()
    b, p = input_ids.shape
    counts = p if prompt_lengths is None else prompt_lengths
    lengths = torch.as_tensor(counts).cpu().expand(b)
    if (lengths < 0).any() or (lengths > p).any():
        raise ValueError(
            f"prompt_lengths is {lengths.tolist()}, expected {b} lengths between 0 and {p}"
        )
    return torch.arange(p) < lengths[:, None]
