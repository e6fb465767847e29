"""The canvas: a prompt, and right behind it `gen_length` masks that generation fills; and its λ.

If prompts differ in length, each is followed by its own answer, and padding is on the right, as in
training. A model learns what follows an answer from the end tokens that training puts behind
answers, so both should reach equally far. A model that was trained on fewer end tokens continues
after its answer, or takes the length of the canvas for that of the answer.

λ of a canvas is the masked share of its answer. This package's losses and samplers set λ at each
forward:

    rows = ForwardRows(input_ids, attention_mask, noise_level)
    if cfg_scale > 0:
        rows = rows.with_masked_prompts(is_prompt, mask_token_id)
    with conditioned(model, rows.noise_level):
        …

Other people's samplers don't. There, λ is read from `input_ids`. Where the prompts end is not among
a forward's arguments, so it is given once:

    with read_noise_from_input_ids(model, prompt_lengths=[12, 30]):
        somebody_elses_generate(model, …)

Inside it, `noise_level(model, …)` still takes precedence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nara_diffusion.noise.level import core_holders, find_holders, noise_level, set_noise_source
from nara_diffusion.noise.masked_share import InputIdsNoise
from nara_diffusion.noise.rows import Repetition, guidance_rows

from .models.backbone import Backbone
from .tokenizer import mask_in_a_text

_MAX_LENGTH = 512


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
    """Put `gen_length` masks behind each prompt.

    An empty prompt becomes a BOS token if the model needs one. Everything is checked and placed on
    the CPU, and then moved to the device of `input_ids`.

    Args:
        input_ids: (b, p) prompts of any integer type.
        prompt_lengths: (b,), lengths of prompts that are padded on the right.
        attention_mask: (b, p), instead of them: 0 on padding, which may be on the right or left.

    Returns:
        (b, l) int64 token ids: prompt, masks, padding; l is the longest prompt + gen_length. (b,)
        where the answers start. (b, l) int64, 0 on padding; None if nothing is padded.

    Raises:
        ValueError: shapes that don't agree, a canvas longer than the model's positions, a prompt
            that contains the mask token.
    """
    device = input_ids.device
    input_ids = input_ids.cpu().long()
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
    positions = torch.arange(length)
    real = positions < starts[:, None] + gen_length  # (b, l)
    sequences = torch.full((len(input_ids), length), pad_token_id)
    sequences[real] = mask_token_id
    # both sides run through the rows in order, and through the tokens of a row in order
    sequences[positions < starts[:, None]] = input_ids[is_prompt]
    padding = None if real.all() else real.long().to(device, non_blocking=True)
    sequences = sequences.to(device, non_blocking=True)
    return sequences, starts.to(device, non_blocking=True), padding


def _prompt_positions(
    input_ids: Tensor,
    prompt_lengths: Tensor | Sequence[int] | None,
    attention_mask: Tensor | None,
) -> Tensor:
    """Return which tokens belong to prompts, (b, p) bool."""
    if prompt_lengths is not None and attention_mask is not None:
        raise ValueError("prompt_lengths and attention_mask say the same: pass one of them")
    if attention_mask is not None:
        return attention_mask.cpu().bool()
    b, p = input_ids.shape
    given = p if prompt_lengths is None else prompt_lengths
    lengths = torch.as_tensor(given).cpu().expand(b)
    if (lengths < 0).any() or (lengths > p).any():
        raise ValueError(
            f"prompt_lengths is {lengths.tolist()}, expected {b} lengths between 0 and {p}"
        )
    return torch.arange(p) < lengths[:, None]


def _check_mask_token(input_ids: Tensor, is_prompt: Tensor, mask_token_id: int) -> None:
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


# ---------------------------------------------------------------- rows of a forward, and their λ


@dataclass(frozen=True)
class ForwardRows:
    """The rows of a forward.

    Attributes:
        input_ids: (b, l), or (2b, l) with guidance: the rows, then the same with masked prompts.
        attention_mask: as `input_ids`; None if there is no padding.
        noise_level: λ of each row, (b,) or (2b,), or of its k blocks, (b, k) or (2b, k).
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    noise_level: Tensor

    def with_masked_prompts(self, is_prompt: Tensor, mask_token_id: int) -> ForwardRows:
        """Return the rows of classifier-free guidance. `is_prompt`: (b, l) bool."""
        input_ids = guidance_rows(self.input_ids)
        input_ids[len(is_prompt) :].masked_fill_(is_prompt, mask_token_id)
        padding = self.attention_mask
        return ForwardRows(
            input_ids,
            None if padding is None else guidance_rows(padding),
            guidance_rows(self.noise_level),
        )


def conditioned(model: nn.Module, level: Tensor) -> AbstractContextManager:
    """Return the context `noise_level(model, λ)`; one that does nothing if no adapter needs λ.

    Adapters without a `noise_convention` get the one of the model.

    Args:
        model: the outermost module.
        level: λ of each row, (b,) float32, or of its k blocks, (b, k).

    Raises:
        ValueError: an adapter that needs λ was trained with another definition of it.
    """
    holders = find_holders(model)
    if not any(holder.needs_noise or holder.merging.binds_level for holder in holders):
        return nullcontext()
    convention = Backbone(model).noise_convention
    for holder in holders:
        names = holder.deviations.noisy(holder.active_names())
        for name, other in holder.finder.adopt_convention(names, convention).items():
            raise ValueError(
                f"Adapter '{name}' was trained with λ defined as {other!r}, and this is "
                f"{convention!r}, a share of the answer's tokens: use an adapter that was trained "
                "with that, or call the model yourself inside `with noise_level(model, value):`."
            )
    return noise_level(model, level)


@contextmanager
def read_noise_from_input_ids(
    model: nn.Module,
    prompt_lengths: int | Sequence[int] | Tensor,
    *,
    mask_token_id: int | None = None,
    repeated: Repetition | None = None,
) -> Iterator[InputIdsNoise]:
    """Inside, `model` reads λ from the masks in its input; afterwards from its former source.

    `InputIdsNoise` describes the arguments and errors. To make this permanent, call
    set_noise_source(model, InputIdsNoise(…)).
    """
    before = [(holder, holder.finder.given_source) for holder in core_holders(model)]
    mask = Backbone(model).mask_token_id(mask_token_id)
    source = InputIdsNoise(prompt_lengths, mask_token_id=mask, repeated=repeated)
    set_noise_source(model, source)
    try:
        yield source
    finally:
        for holder, former in before:
            holder.finder.given_source = former
