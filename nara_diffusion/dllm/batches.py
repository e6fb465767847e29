"""Order the rows of a run, and collate them into batches."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nara_diffusion.utils.data_order import ShuffledStream

from .records import with_column

if TYPE_CHECKING:
    from datasets import Dataset


Row = Mapping[str, Any]
"""A row that `encode_records` returned."""


class GlobalBatchStream(ShuffledStream):
    """A stream of encoded rows with one record at each position.

    If a conversation has several rows, one of them is drawn by (seed, position). Each row stores
    the length of the longest row in its global batch as "longest", even if another forward or
    process takes that row.
    """

    def __init__(self, rows: Dataset, seed: int, global_batch: int):
        numbers = rows.with_format("numpy")["record"][:]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        super().__init__(range(len(starts)), seed)
        self.rows, self.global_batch = rows, global_batch
        self._starts = [*starts.tolist(), len(rows)]
        self._first, self._longest = -1, 0

    def _row(self, position: int) -> dict[str, Any]:
        record = self.sample_at(position)
        of_record = range(self._starts[record], self._starts[record + 1])
        if len(of_record) == 1:
            return self.rows[of_record[0]]
        return self.rows[Random(f"{self.seed} {position}").choice(of_record)]

    def __getitem__(self, position: int) -> dict[str, Any]:
        first = position - position % self.global_batch
        if first != self._first:
            batch = [self._row(first + i) for i in range(self.global_batch)]
            self._first, self._longest = first, max(len(row["input_ids"]) for row in batch)
        return self._row(position) | {"position": position, "longest": self._longest}


def with_longest(rows: Dataset, global_batch: int) -> Dataset:
    """Return the rows for validation, in order, with "longest" as in `GlobalBatchStream`."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest: list[int] = []
    for first in range(0, len(lengths), global_batch):
        batch = lengths[first : first + global_batch]
        longest += [max(batch)] * len(batch)
    return with_column(rows, "longest", longest)


@dataclass(frozen=True)
class AnswerCollator:
    """Turn rows into {input_ids (b, l), prompt_lengths, answer_lengths}.

    `input_ids` are padded on the right. The lengths are lists of b numbers, so they stay on the CPU
    when the tensors of a batch are moved to a device. If the rows have a "position" in the training
    stream, the batch also has a list `sample_indices` with these positions. All entries of a batch
    are arguments of `masked_diffusion_loss`.

    Args:
        end_token_id: the token that pads the rows.
        trained_padding: the part of the padding that counts as answer, to be masked and trained on:
            "gen_length": up to `gen_length` tokens after the prompt, which generation fills;
            "longest": up to the length of the longest row in the global batch, as in LLaDA. The
                rows store this length as "longest" (see `GlobalBatchStream`). If they don't, the
                longest row of the batch counts;
            a number: this many tokens.
            Except with "longest", the loss of a row doesn't depend on the other rows.
        gen_length: the length of the answers with "gen_length".
        multiple: a length; complete answers are padded further, to a multiple of it.
    """

    end_token_id: int
    trained_padding: str | int = "longest"
    gen_length: int | None = None
    multiple: int = 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
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
