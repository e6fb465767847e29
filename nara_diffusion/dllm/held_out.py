"""Hold records out of training for validation, and find rows that training and measuring share.

Without a validation file, some records are held out of training. Rows of tokens that equal held-out
ones are removed from training, whether their records are copies or become equal only as tokens.
Validation and test files that the user gives aren't changed; the run warns if they repeat training
rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from nara_diffusion.utils.wording import counted

from .encoding import EncodedRecords
from .records import column_batches

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


_MOST_HELD_OUT = 128  # records; the default is to hold out a tenth, but not more than this


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
    held_out_keys = set(_row_keys(held_out.rows))
    places = [i for i, key in enumerate(_row_keys(training.rows)) if key not in held_out_keys]
    size = len(training.rows)
    if len(places) == size:
        return training
    dropped = size - len(places)
    if 2 * dropped > size:
        raise ValueError(
            f"training data: {dropped} of {counted(size, 'row')} of tokens equal held-out ones: "
            "remove the copies and give --num_train_epochs, give more varied records, or a "
            "validation_file"
        )
    logger.warning(
        "training data: %d of %d rows equal held-out ones and are left out", dropped, size
    )
    return replace(training, rows=training.rows.select(places))


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
    for table in column_batches(rows, ("input_ids", "prompt_length")):
        ids = table["input_ids"].combine_chunks()
        ends = ids.value_lengths().to_numpy().cumsum()
        tokens = np.split(ids.flatten().to_numpy(), ends[:-1])
        starts = table["prompt_length"].to_pylist()
        for start, of_row in zip(starts, tokens, strict=True):
            yield sha256(f"{start} ".encode() + of_row.tobytes()).digest()
