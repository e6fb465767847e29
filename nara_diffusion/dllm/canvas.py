"""The canvas: a prompt, and `gen_length` masks right behind it that generation fills.

Prompts of unequal length are each followed by their own answer, and padding stands on the right, as in training. What
follows an answer is learned from the end tokens that training puts behind answers, so both should reach equally far: a
model that was trained on less writes on after its answer, or takes the length of the canvas for that of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nara_diffusion.training.loop import ShuffledStream
from nara_diffusion.utils.naming import counted

from .models.backbone import Backbone

if TYPE_CHECKING:
    from datasets import Dataset

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
    lengths = torch.as_tensor(
        p if prompt_lengths is None else prompt_lengths, device=device
    ).expand(b)
    if (lengths < 0).any() or (lengths > p).any():
        raise ValueError(
            f"prompt_lengths is {lengths.tolist()}, expected {b} lengths between 0 and {p}"
        )
    is_prompt = (
        torch.arange(p, device=device) < lengths[:, None]
        if attention_mask is None
        else attention_mask.bool()
    )
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
    sequences[positions < starts[:, None]] = input_ids[
        is_prompt
    ]  # both run through rows in order, and tokens in order
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
    length, left = longest_prompt + gen_length, (Backbone(model).position_limit or 0) - gen_length
    what = f"the longest prompt has {longest_prompt} tokens and gen_length is {gen_length}, together {length}"
    remedy = "lower gen_length, or take shorter prompts and conversations"
    if record and left > 0:
        remedy += f" (the longest is {record}); --data_options max_prompt_length={left} leaves longer ones out"
    check_positions(model, length, what, remedy)


def checked_lengths(model: nn.Module, max_length: int | None, gen_length: int) -> int:
    """`max_length` of a training run; None is 512, or as many as the model has positions.

    Raises:
        ValueError: one of both is beyond the model's positions.
    """
    check_positions(
        model,
        gen_length + 1,
        f"gen_length is {gen_length}",
        "lower it, prompt and answer share them",
    )
    if max_length is None:
        return min(_MAX_LENGTH, Backbone(model).position_limit or _MAX_LENGTH)
    check_positions(
        model, max_length, f"max_length is {max_length}", "lower it, longer answers are cut"
    )
    return max_length


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class AnswerCollator:
    """Rows of `encode_records` → {input_ids (b, l), prompt_lengths (b,), answer_lengths (b,)}, padded on the right.

    A "position" in the rows, their place in the training stream, becomes `sample_indices` (b,); the batch is then what
    `masked_diffusion_loss` takes.

    Args:
        end_token_id: the token that pads the rows.
        trained_padding: how much of the padding counts as answer, and so is masked and trained on:
            "gen_length" as far as `gen_length` tokens after the prompt, which is what generation fills;
            "longest" as far as the longest row of the global batch, as LLaDA does, which rows name under "longest"
                (see `GlobalBatchStream`); rows without it go as far as the longest that is given;
            a number: that many tokens.
            Under all but "longest", a row's loss doesn't depend on the rows beside it.
        gen_length: length of the answers under "gen_length".
    """

    end_token_id: int
    trained_padding: str | int = "longest"
    gen_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        answer_lengths = torch.tensor(self.answer_lengths(rows))
        prompt_lengths = torch.tensor([row["prompt_length"] for row in rows])
        input_ids = torch.full(
            (len(rows), int((prompt_lengths + answer_lengths).max())), self.end_token_id
        )
        for padded, row in zip(input_ids, rows, strict=True):
            padded[: len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
        batch = {
            "input_ids": input_ids,
            "prompt_lengths": prompt_lengths,
            "answer_lengths": answer_lengths,
        }
        if "position" in rows[0]:
            batch["sample_indices"] = torch.tensor([row["position"] for row in rows])
        return batch

    def answer_lengths(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of each row that are trained on. A cut answer is trained as it is, since it has no end."""
        longest, found = max(len(row["input_ids"]) for row in rows), []
        for row in rows:
            length, prompt = len(row["input_ids"]), row["prompt_length"]
            end = (
                self.padded_length(length, prompt, row.get("longest", longest))
                if self.is_whole(row)
                else length
            )
            found.append(end - prompt)
        return found

    def is_whole(self, row: Mapping[str, Any]) -> bool:
        """Whether the row's answer has its end, and wasn't cut."""
        return int(row["input_ids"][-1]) == self.end_token_id

    def padded_length(self, length: int, prompt: int, longest: int) -> int:
        """The length of a row with its trained padding, beside a row of `longest` tokens."""
        if self.trained_padding == "gen_length":
            return max(length, prompt + self.gen_length)  # type: ignore[operator]
        return longest if self.trained_padding == "longest" else length + int(self.trained_padding)


class GlobalBatchStream(ShuffledStream):
    """A stream of encoded rows, a record at a position: of a conversation's rows, one that (seed, position) draws.

    Each has under "longest" the number of tokens of the longest row of its global batch, which may lie in other
    forwards and other processes.
    """

    def __init__(self, rows: Dataset, seed: int, global_batch: int):
        starts = np.flatnonzero(np.diff(rows.with_format("numpy")["record"][:], prepend=-1))
        super().__init__(range(len(starts)), seed)
        self.rows, self.global_batch = rows, global_batch
        self._starts = [*starts.tolist(), len(rows)]
        self._first, self._longest = -1, 0

    def _row(self, position: int) -> Any:
        """The row at a position."""
        record = self.sample_at(position)
        of_record = range(self._starts[record], self._starts[record + 1])
        return self.rows[
            of_record[0]
            if len(of_record) == 1
            else Random(f"{self.seed} {position}").choice(of_record)
        ]

    def __getitem__(self, position: int) -> dict[str, Any]:
        first = position - position % self.global_batch
        if first != self._first:
            batch = map(self._row, range(first, first + self.global_batch))
            self._first, self._longest = first, max(len(row["input_ids"]) for row in batch)
        return self._row(position) | {"position": position, "longest": self._longest}


def with_longest(rows: Dataset, global_batch: int) -> Dataset:
    """Rows for validation, in their order, with the "longest" of every `global_batch` of them, as in training."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    firsts = [i - i % global_batch for i in range(len(lengths))]
    return rows.add_column("longest", [max(lengths[i : i + global_batch]) for i in firsts])  # type: ignore[call-arg]


def trained_canvas(
    stream: ShuffledStream, collator: AnswerCollator, gen_length: int, block_length: int | None
) -> tuple[str, list[str]]:
    """What training shows of the canvas that generation fills, by the first samples of its `stream`.

    Returns:
        One line for the run's facts; warnings where generation goes beyond what training shows, or ends before answers.
    """
    rows = [stream[position] for position in range(min(len(stream.samples), _SAMPLE))]
    prompts = [row["prompt_length"] for row in rows]
    answers = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
    trained, padding = (
        collator.answer_lengths(rows),
        f"(trained_padding {collator.trained_padding})",
    )
    blocks = counted(gen_length // (block_length or gen_length), "block")
    fact = (
        f"prompts of {_span(prompts)} tokens, answers of {_span(answers)} tokens with their end, trained to "
        f"{_span(trained)} tokens {padding}, {round(sum(prompts + trained) / len(rows))} positions a sample; "
        f"generated: gen_length {gen_length} in {blocks}"
    )
    short = [
        n for n, row in zip(trained, rows, strict=True) if n < gen_length and collator.is_whole(row)
    ]
    beyond = (
        f"gen_length is {gen_length}, and {len(short)} of {counted(len(rows), 'sample')} end before that, the shortest "
        f"after {min(short, default=0)} tokens {padding}: what follows an answer there is not trained, and generated "
        "answers can become worse than the base model's while the validation loss falls; "
        "give --trained_padding gen_length"
    )
    asked = (
        (n, row) for n, row in zip(answers, rows, strict=True) if row["instruction"]
    )  # no texts without a prompt
    lengths = [n - collator.is_whole(row) for n, row in asked]  # without the end token
    long = [n for n in lengths if n > gen_length]
    before = (
        f"gen_length is {gen_length}, and {len(long)} of {counted(len(rows), 'sample')} have longer answers, up to "
        f"{max(long, default=0)} tokens: a generated answer is cut there, and exact match counts it as wrong; "
        f"give --gen_length {max(long, default=0)}"
    )
    return fact, [beyond] * bool(short) + [before] * bool(long)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
