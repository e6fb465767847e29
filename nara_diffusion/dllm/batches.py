"""Batches: select the rows to train on, order them, and collate them.

Without a validation file, some records are held out of training. Rows of tokens that equal held-out
ones are removed from training, whether their records are copies or become equal only as tokens.
Validation and test files that the user gives aren't changed; the run warns if they repeat training
rows.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nara_diffusion.utils.data_order import ShuffledStream
from nara_diffusion.utils.files import counted

from .encoding import EncodedRecords
from .records import column_batches, with_column

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_MOST_HELD_OUT = 128  # records; the default is to hold out a tenth, but not more than this
_SAMPLE = 1000  # samples of the training stream that `trained_canvas` reads

Row = Mapping[str, Any]
"""A row that `encode_records` returned."""


# ---------------------------------------------------------------- records and rows of training and validation


def hold_out(records: Dataset, number: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """Return (training, validation) records.

    Args:
        number: the number of records to hold out. None holds out a tenth, 128 at most.

    Raises:
        ValueError: more records would be held out than left for training.
    """
    held_out = number or max(1, min(_MOST_HELD_OUT, len(records) // 10))
    left = len(records) - held_out
    if left < held_out:
        remedy = "lower validation_samples, or " if len(records) > 1 else ""
        raise ValueError(
            f"training records: {len(records)}. {held_out} can't be spared for validation, "
            f"since that leaves {max(left, 0)}: {remedy}give a validation_file"
        )
    parts = records.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def without_held_out(training: EncodedRecords, held_out: EncodedRecords) -> EncodedRecords:
    """Return `training` without the rows that are also in `held_out`.

    Raises:
        ValueError: fewer than half of the rows are left.
    """
    held = set(_row_keys(held_out.rows))
    kept = [i for i, key in enumerate(_row_keys(training.rows)) if key not in held]
    size = len(training.rows)
    if len(kept) == size:
        return training
    dropped = size - len(kept)
    if 2 * dropped > size:
        raise ValueError(
            f"training data: {dropped} of {counted(size, 'row')} of tokens equal held-out ones: "
            "remove the copies and give --num_train_epochs, give more varied records, or a "
            "validation_file"
        )
    logger.warning(
        "training data: %d of %d rows equal held-out ones and are left out", dropped, size
    )
    return replace(training, rows=training.rows.select(kept))


def rows_in_training(training: Dataset, **measured: Dataset) -> list[str]:
    """Return a warning for each of the `measured` data sets that repeats rows of `training`."""
    trained = set(_row_keys(training))
    warnings = []
    for name, rows in measured.items():
        number = sum(key in trained for key in _row_keys(rows))
        if number:
            warnings.append(
                f"{number} of {counted(len(rows), f'{name} row')} are training rows too: figures "
                "on them don't show what the model does with new records."
            )
    return warnings


def _row_keys(rows: Dataset) -> Iterator[bytes]:
    """Yield a digest of each row, made from its tokens and the start of its answer."""
    for table in column_batches(rows, ("input_ids", "prompt_length"), "arrow"):
        ids = table["input_ids"].combine_chunks()
        ends = ids.value_lengths().to_numpy().cumsum()
        tokens = np.split(ids.flatten().to_numpy(), ends[:-1])
        starts = table["prompt_length"].to_pylist()
        for start, of_row in zip(starts, tokens, strict=True):
            yield sha256(f"{start} ".encode() + of_row.tobytes()).digest()


# ---------------------------------------------------------------- order


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


# ---------------------------------------------------------------- collating


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


# ---------------------------------------------------------------- training and generation compared


def trained_canvas(
    stream: ShuffledStream, collator: AnswerCollator, gen_length: int, block_length: int
) -> tuple[str, list[str]]:
    """Compare the canvas of generation with the part of it that training covers.

    Args:
        stream: the training stream. Only the first samples are read.

    Returns:
        A line for the run's facts, and warnings. There is a warning if generation goes beyond the
        positions that training covers, or ends before the answers do.
    """
    rows = [stream[position] for position in range(min(len(stream.samples), _SAMPLE))]
    prompts = [row["prompt_length"] for row in rows]
    answers = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
    trained = collator.answer_lengths(rows)
    padding = f"(trained_padding {collator.trained_padding})"
    mean = round(sum(prompts + trained) / len(rows))
    fact = (
        f"prompts {_span(prompts)}, answers {_span(answers)}, trained to {_span(trained)} tokens "
        f"{padding}, {mean} positions a sample; "
        f"gen_length {gen_length} in {counted(gen_length // block_length, 'block')}"
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
