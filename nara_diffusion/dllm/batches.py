"""Order the rows of a run, collate them into batches, and compare these with the canvas of generation."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nara_diffusion.utils.data_order import ShuffledStream, grouped_by_length
from nara_diffusion.utils.wording import counted

from .encoding import text_columns
from .records import column_batches, with_column

if TYPE_CHECKING:
    from datasets import Dataset


Row = Mapping[str, Any]
"""A row that `encode_records` returned."""


class GlobalBatchStream(ShuffledStream):
    """A stream of encoded rows with one record at each position.

    If a conversation has several rows, one of them is drawn by seed and position.

    Args:
        global_batch: the number of rows in a global batch.
        lengths: the number of positions of each row, to form the global batches by length (see
            `grouped_by_length`); None to form them at random.
    """

    def __init__(
        self, rows: Dataset, seed: int, global_batch: int, lengths: np.ndarray | None = None
    ):
        numbers = rows.with_format("numpy")["record"][:]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        super().__init__(range(len(starts)), seed)
        self.rows, self.global_batch, self.lengths = rows, global_batch, lengths
        self._starts = [*starts.tolist(), len(rows)]

    def order_of(self, epoch: int) -> list[int]:
        """Return the indices of the rows in the order of an epoch."""
        records = super().order_of(epoch)
        first = epoch * len(records)
        rows: list[int] = []
        for position, record in enumerate(records, first):
            row, stop = self._starts[record : record + 2]
            if stop > row + 1:
                row = Random(f"{self.seed} {position}").choice(range(row, stop))
            rows.append(row)
        if self.lengths is None:
            return rows
        return grouped_by_length(rows, self.lengths, self.global_batch, first, (self.seed, epoch))

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.rows[self.sample_at(position)] | {"position": position}


def with_longest(rows: Dataset, batch_size: int, is_grouped: bool) -> Dataset:
    """Return the rows for validation, in order, with "longest" for the collator.

    This is the length of the longest of `batch_size` rows: neighbours in the data, or in length if
    `is_grouped`. So padding is trained as far as a forward of training would.
    """
    lengths = token_counts(rows)
    order = np.argsort(lengths, kind="stable") if is_grouped else np.arange(len(lengths))
    longest = np.maximum.reduceat(lengths[order], np.arange(0, len(order), batch_size))
    return with_column(rows, "longest", longest[order.argsort() // batch_size].tolist())


def token_counts(rows: Dataset) -> np.ndarray:
    """Return the number of tokens of each row; of a pair, those of the longer text."""
    counts: list[np.ndarray] = []
    for table in column_batches(rows, text_columns(rows)):
        texts = [column.combine_chunks().value_lengths().to_numpy() for column in table.columns]
        counts.append(np.maximum.reduce(texts))
    return np.concatenate(counts)


@dataclass(frozen=True)
class AnswerCollator:
    """Turn rows into {input_ids (b, l), prompt_lengths, answer_lengths}.

    Rows of preferences become 2b rows: all with the chosen answers, then all with the rejected.

    `input_ids` are padded on the right. The lengths are lists of b numbers, so they stay on the CPU
    when the tensors of a batch are moved to a device. If the rows have a "position" in the training
    stream, the batch also has a list `sample_indices` with these positions. All entries of a batch
    are arguments of `masked_diffusion_loss`.

    Args:
        end_token_id: the token that pads the rows.
        trained_padding: the part of the padding that counts as answer, to be masked and trained on:
            "gen_length": up to `gen_length` tokens after the prompt, which generation fills;
            "longest": up to the length of the longest row of the batch, or to the length that the
                row has as "longest" (see `with_longest`);
            a number: this many tokens.
            Except with "longest", the loss of a row doesn't depend on the other rows. With
            "longest", it depends on the rows of one forward, never on other processes or forwards.
        gen_length: the length of the answers with "gen_length".
        multiple: a length; complete answers are padded further, to a multiple of it.
    """

    end_token_id: int
    trained_padding: str | int = "longest"
    gen_length: int | None = None
    multiple: int = 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if "rejected" in rows[0]:
            rows = [*rows, *({**row, "input_ids": row["rejected"]} for row in rows)]
        answer_lengths = self.answer_lengths(rows)
        prompt_lengths = [int(row["prompt_length"]) for row in rows]
        width = max(map(operator.add, prompt_lengths, answer_lengths))
        input_ids = torch.full((len(rows), width), self.end_token_id)  # (b, l)
        for padded, row in zip(input_ids, rows, strict=True):
            padded[: len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
        batch = {
            "input_ids": input_ids,
            "prompt_lengths": prompt_lengths,
            "answer_lengths": answer_lengths,
        }
        if "position" in rows[0]:
            batch["sample_indices"] = [row["position"] for row in rows]
        return batch

    def answer_lengths(self, rows: Sequence[Row]) -> list[int]:
        """Return the number of tokens of each row that are trained on.

        An answer that was cut gets no padding, since it has no end token.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        lengths = []
        for row in rows:
            length, prompt = len(row["input_ids"]), row["prompt_length"]
            if self.is_whole(row):
                length = self.padded_length(length, prompt, row.get("longest", longest))
            lengths.append(length - prompt)
        return lengths

    def row_lengths(self, rows: Dataset) -> np.ndarray:
        """Return the number of positions of each row. "longest" adds none."""
        lengths = token_counts(rows)
        is_whole = lengths == np.array(rows["length"])
        padded = map(self.padded_length, lengths.tolist(), rows["prompt_length"], lengths.tolist())
        return np.where(is_whole, list(padded), lengths)

    def is_whole(self, row: Row) -> bool:
        """Return True if the answer of the row is complete, with its end token."""
        return int(row["input_ids"][-1]) == self.end_token_id

    def padded_length(self, length: int, prompt: int, longest: int) -> int:
        """Return the length of a row with its trained padding; see the class for `longest`."""
        if self.trained_padding == "longest":
            padded = longest
        elif self.trained_padding == "gen_length":
            assert self.gen_length is not None
            padded = max(length, prompt + self.gen_length)
        else:
            padded = length + int(self.trained_padding)
        return padded + (prompt - padded) % self.multiple


def batches_of(
    rows: Sequence[Row],
    indices: Sequence[int],
    collator: AnswerCollator,
    batch_size: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Yield the rows at `indices` as batches on `device`, with `indices` as `sample_indices`."""
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        batch = collator([{**rows[i], "position": i} for i in chosen])
        batch["input_ids"] = batch["input_ids"].to(device, non_blocking=True)
        yield batch


_SAMPLE = 1000  # samples of the training stream that `trained_canvas` reads


def trained_canvas(
    stream: ShuffledStream,
    collator: AnswerCollator,
    batch_size: int,
    gen_length: int,
    block_length: int,
) -> tuple[str, list[str]]:
    """Compare the canvas of generation with the part of it that training covers.

    Args:
        stream: the training stream. Only the first samples are read.
        batch_size: the number of samples of a forward.

    Returns:
        A line for the run's facts, and warnings. There is a warning if generation goes beyond the
        positions that training covers, or ends before the answers do.
    """
    rows = [stream[position] for position in range(min(len(stream.samples), _SAMPLE))]
    prompts = [row["prompt_length"] for row in rows]
    answers = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
    trained: list[int] = []
    for first in range(0, len(rows), batch_size):
        trained += collator.answer_lengths(rows[first : first + batch_size])
    padding = f"(trained_padding {collator.trained_padding})"
    fact = (
        f"prompts {_span(prompts)}, answers {_span(answers)}, trained to {_span(trained)} tokens "
        f"{padding}; gen_length {gen_length} in {counted(gen_length // block_length, 'block')}"
    )
    short, long = [], []
    for row, answer, end in zip(rows, answers, trained, strict=True):
        is_whole = collator.is_whole(row)
        length = answer - is_whole  # without the end token
        if is_whole and end < gen_length and collator.multiple == 1:  # else it ends with a canvas
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
