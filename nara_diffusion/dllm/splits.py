"""Which records are trained on, and which are measured on; and what stands on both sides.

Without a validation file some records are held out. Equal records count once there: copies of held-out ones are left
out of training. Different texts can give equal rows of tokens (white space that a chat template drops, answers that
are cut): such rows are left out of training, too. Files that are given stay as they are, and the run says how many of
their rows it trains on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from nara_diffusion.utils.naming import counted

from .encoding import EncodedRecords
from .records import BATCH, FIELDS, read_records

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_MOST_HELD_OUT = 128  # records for validation, of which a tenth is taken where no number is given
_TRAINED_ON = ("instruction", "input", "output", "turns")


def load_records(args: Any) -> tuple[Dataset, Dataset, Dataset]:
    """The (training, validation, test) records that a run's arguments name.

    Raises:
        ValueError: see `read_records`; or fewer training records would be left than are held out for validation.
    """
    fields = {what: name for what in FIELDS if (name := getattr(args, f"{what}_field")) is not None}
    options: dict[str, Any] = {"fields": fields, "config": args.dataset_config_name}
    records = read_records(
        args.dataset_name or args.train_file, **options, limit=args.max_train_samples
    )
    records = records.add_column("number", range(len(records)))  # type: ignore[call-arg]
    if args.validation_file is not None:
        validation = read_records(args.validation_file, **options)
    else:
        records, validation = hold_out(records, args.validation_samples, args.seed)
    test = validation if args.test_file is None else read_records(args.test_file, **options)
    if args.test_samples is not None:
        test = test.select(range(min(len(test), args.test_samples)))
    return records, validation, test


# ---------------------------------------------------------------- held-out records


def hold_out(records: Dataset, number: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation): `number` different records are held out, by default a tenth of them.

    Args:
        records: with their "number", from 0.
    """
    first = _first_copies(records)
    different = [i for i, copied in enumerate(first) if i == copied]
    held_out = number or max(1, min(_MOST_HELD_OUT, len(different) // 10))
    left = len(different) - held_out
    if left < held_out:
        size = f"{len(records)}" + (
            f", {len(different)} of them different" if len(different) < len(records) else ""
        )
        remedy = "lower validation_samples, or " if len(different) > 1 else ""
        raise ValueError(
            f"training records: {size}. {held_out} can't be spared for validation, since that leaves {max(left, 0)}: "
            f"{remedy}give a validation_file"
        )
    once = records if len(different) == len(records) else records.select(different)
    parts = once.train_test_split(test_size=held_out, seed=seed)
    if once is records:
        return parts["train"], parts["test"]
    held = set(parts["test"]["number"][:])
    copies = [i for i, copied in enumerate(first) if i != copied and copied not in held]
    training = records.select([*parts["train"]["number"][:], *copies])
    if dropped := len(records) - len(training) - held_out:
        counts = (dropped, len(different), len(records))
        logger.warning(
            "training data: copies of held-out records are left out: %d (%d of %d differ)", *counts
        )
    return training, parts["test"]


def _first_copies(records: Dataset) -> list[int]:
    """For each record, the number of the first one with the same prompt and answer."""
    names = [name for name in _TRAINED_ON if name in records.column_names]
    seen: dict[bytes, int] = {}
    first: list[int] = []
    for batch in records.select_columns(names).iter(BATCH):
        for values in zip(*(batch[name] for name in names), strict=True):  # type: ignore[index]
            first.append(seen.setdefault(sha256(repr(values).encode()).digest(), len(first)))
    return first


# ---------------------------------------------------------------- rows on both sides


def without_held_out(training: EncodedRecords, held_out: EncodedRecords) -> EncodedRecords:
    """`training` without the rows that `held_out` has too. Raises ValueError if none is left."""
    held = set(_row_keys(held_out.rows))
    kept = [i for i, key in enumerate(_row_keys(training.rows)) if key not in held]
    if len(kept) == len(training.rows):
        return training
    if not kept:
        raise ValueError(
            f"training data: each of its {counted(len(training.rows), 'row')} of tokens equals a held-out one: "
            "give more varied records, or a validation_file"
        )
    dropped = len(training.rows) - len(kept)
    logger.warning(
        "training data: %d of %d rows equal held-out ones and are left out",
        dropped,
        len(training.rows),
    )
    return replace(training, rows=training.rows.select(kept))


def rows_in_training(training: Dataset, **measured: Dataset) -> list[str]:
    """A sentence for each of the `measured` rows, by their name, that has rows of `training`."""
    trained = set(_row_keys(training))
    sentences = []
    for name, rows in measured.items():
        number = sum(key in trained for key in _row_keys(rows))
        if number:
            sentences.append(
                f"{number} of {counted(len(rows), f'{name} row')} are training rows too: figures on them don't show "
                "what the model does with new records."
            )
    return sentences


def _row_keys(rows: Dataset) -> Iterator[bytes]:
    """Of each row, a digest of its tokens and of where its answer begins."""
    for table in (
        rows.select_columns(["input_ids", "prompt_length"]).with_format("arrow").iter(BATCH)
    ):
        ids: Any = table["input_ids"].combine_chunks()  # type: ignore[index]
        ends = ids.value_lengths().to_numpy().cumsum()
        starts: Any = table["prompt_length"].to_pylist()  # type: ignore[index]
        for tokens, start in zip(
            np.split(ids.flatten().to_numpy(), ends[:-1]), starts, strict=True
        ):
            yield sha256(f"{start} ".encode() + tokens.tobytes()).digest()
