"""Rows of token ids as batches: how far each answer is followed by end tokens that are trained on.

Generation starts from `gen_length` masks behind the prompt, its canvas. What follows an answer there is learned from
the end tokens that training puts behind answers, so the two should reach equally far: a model that was trained on
less writes on after its answer, or takes the length of the canvas for that of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nara_diffusion.training.stream import ShuffledStream
from nara_diffusion.utils.naming import counted

if TYPE_CHECKING:
    from datasets import Dataset

_SAMPLE = 1000  # samples of the training stream that `trained_canvas` looks at


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
        input_ids = torch.full((len(rows), int((prompt_lengths + answer_lengths).max())), self.end_token_id)
        for padded, row in zip(input_ids, rows, strict=True):
            padded[: len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
        batch = {"input_ids": input_ids, "prompt_lengths": prompt_lengths, "answer_lengths": answer_lengths}
        if "position" in rows[0]:
            batch["sample_indices"] = torch.tensor([row["position"] for row in rows])
        return batch

    def answer_lengths(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of each row that are trained on. A cut answer is trained as it is, since it has no end."""
        longest, found = max(len(row["input_ids"]) for row in rows), []
        for row in rows:
            length, prompt = len(row["input_ids"]), row["prompt_length"]
            end = self.padded_length(length, prompt, row.get("longest", longest)) if self.is_whole(row) else length
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
        return self.rows[of_record[0] if len(of_record) == 1 else Random(f"{self.seed} {position}").choice(of_record)]

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
    trained, padding = collator.answer_lengths(rows), f"(trained_padding {collator.trained_padding})"
    blocks = counted(gen_length // (block_length or gen_length), "block")
    fact = (
        f"prompts of {_span(prompts)} tokens, answers of {_span(answers)} tokens with their end, trained to "
        f"{_span(trained)} tokens {padding}, {round(sum(prompts + trained) / len(rows))} positions a sample; "
        f"generated: gen_length {gen_length} in {blocks}"
    )
    short = [n for n, row in zip(trained, rows, strict=True) if n < gen_length and collator.is_whole(row)]
    beyond = (
        f"gen_length is {gen_length}, and {len(short)} of {counted(len(rows), 'sample')} end before that, the shortest "
        f"after {min(short, default=0)} tokens {padding}: what follows an answer there is not trained, and generated "
        "answers can become worse than the base model's while the validation loss falls; "
        "give --trained_padding gen_length"
    )
    asked = ((n, row) for n, row in zip(answers, rows, strict=True) if row["instruction"])  # no texts without a prompt
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
