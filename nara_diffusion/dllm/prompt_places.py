"""Put masks after prompts of unequal length, which is the canvas of generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .models.backbone import Backbone
from .text_lengths import check_canvas
from .tokenizer import mask_in_a_text


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
