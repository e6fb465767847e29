"""Questions and answers from JSON files, in the form of the LLM-Adapters data sets.

A file is a JSON list of objects or JSON Lines, one object a line, gzipped or not, each like

    {"instruction": "What is 2 + 3?", "output": "2 + 3 = 5. The answer is 5.", "answer": "5"}

`instruction` is the question, with an optional `input` as its second part, `output` what the model learns to write, and
`answer` what a generation is compared with. Files without any `answer` are compared by their whole `output`. These
fields hold texts, numbers, true or false; other fields are not read.

`datasets` is imported where it is needed, since training and evaluation need it and generation doesn't.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .json_files import read_json_objects

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_MOST_HELD_OUT = 128  # records for validation, of which a tenth is taken where no number is given
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # Unicode's control and format characters, and its kinds of white space
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class FieldNames:
    """The names of the four fields in a file."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    answer: str = "answer"


def records_from_file(path: str | Path, fields: FieldNames = FieldNames()) -> Dataset:
    """The records of a JSON or JSON Lines file: a Dataset of strings `instruction`, `input`, `output`, `answer`.

    Raises:
        ValueError: no such file, an empty or broken one (with the line), a record that lacks instruction, output or
            answer, or has something there that is no text (with its number).
    """
    return normalized(read_json_objects(Path(path)), fields, source=str(path))


def records_from_hub(path: str, *, split: str = "train", fields: FieldNames = FieldNames(), **kwargs: Any) -> Dataset:
    """Read the records of a data set on the Hub, or of a folder; keyword arguments go to `datasets.load_dataset`.

    Raises:
        ValueError: it can't be loaded; a record as `records_from_file` refuses it.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(path, split=split, **kwargs)
    except Exception as error:  # whatever `datasets` raises: it has a dozen classes for "not found" alone
        raise ValueError(f"the data set {path} ({split}) can't be loaded: {error}") from error
    return normalized(rows, fields, source=f"{path} ({split})")


def load_records(args: Any) -> tuple[Dataset, Dataset, Dataset]:
    """The (training, validation, test) records that a run's arguments name, in files or on the Hub.

    Raises:
        ValueError: see `records_from_file`; or fewer training records would be left than are held out for validation.
    """
    fields = FieldNames(args.instruction_field, args.input_field, args.output_field, args.answer_field)
    if args.dataset_name is not None:
        records = records_from_hub(args.dataset_name, name=args.dataset_config_name, fields=fields)
    else:
        records = records_from_file(args.train_file, fields)
    if args.validation_file is not None:
        validation = records_from_file(args.validation_file, fields)
    else:
        records, validation = _held_out(records, args.validation_samples, args.seed)
    test = validation if args.test_file is None else records_from_file(args.test_file, fields)
    return records, validation, test.select(range(min(len(test), args.test_samples or len(test))))


def _held_out(records: Dataset, validation_samples: int | None, seed: int) -> tuple[Dataset, Dataset]:
    held = validation_samples or max(1, min(_MOST_HELD_OUT, len(records) // 10))
    left = max(len(records) - held, 0)
    if left < held:
        raise ValueError(
            f"{len(records)} training records can't spare {held} for validation, which leaves {left} to train on: "
            "lower validation_samples, or give a validation_file."
        )
    parts = records.train_test_split(test_size=held, seed=seed)
    return parts["train"], parts["test"]


def normalized(records: Iterable[Mapping[str, Any]], fields: FieldNames = FieldNames(), *, source: str) -> Dataset:
    """Check `records`, and rename their fields to those of this module. Messages call them `source`."""
    from datasets import Dataset

    rows = [_Record(record, fields, f"record {n} of {source}") for n, record in enumerate(records, 1)]
    if not rows:
        raise ValueError(f"{source} holds no records")
    _warn_of_absent(fields, rows, source)
    answered = any(row.text("answer").strip() for row in rows)
    return Dataset.from_list([row.normal(answered) for row in rows])


def _warn_of_absent(names: FieldNames, rows: Sequence[_Record], source: str) -> None:
    """Warn of optional fields that the user named and that no record has."""
    for what in ("input", "answer"):
        name = getattr(names, what)
        if name != getattr(FieldNames, what) and not any(name in row.fields for row in rows):
            logger.warning(
                "no record of %s has the field %r, which was named for its %s: it counts as left out; the first has %s",
                *(source, name, what, ", ".join(rows[0].fields)),
            )


class _Record:
    """A record of a file, with the file's own names of fields. Messages call it `where`."""

    def __init__(self, fields: Mapping[str, Any], names: FieldNames, where: str) -> None:
        self.fields, self.names, self.where = fields, names, where

    def normal(self, answered: bool) -> dict[str, str]:
        """The record with this module's names of fields. Its answer is its output unless it is `answered`."""
        output = self.required("output")
        return {
            "instruction": self.required("instruction"),
            "input": self.text("input"),
            "output": output,
            "answer": self.required("answer").strip() if answered else output,
        }

    def required(self, what: str) -> str:
        text = self.text(what)
        if all(unicodedata.category(character) in _INVISIBLE for character in text):
            missing = f"is missing; the record has {', '.join(self.fields) or 'no fields'}"
            raise self.refusal(what, "is empty" if getattr(self.names, what) in self.fields else missing)
        return text

    def text(self, what: str) -> str:
        """The text of a field, unchanged: white space at the start of an output can be Python's."""
        value = self.fields.get(getattr(self.names, what))
        text = _as_text(value)
        if text is None:
            raise self.refusal(what, f"{_description(value)}: expected a text or a number")
        half = _HALF_A_PAIR.search(text)
        if half:
            near = f"U+{ord(half[0]):04X}, after {text[max(half.start() - 20, 0) : half.start()]!r}"
            raise self.refusal(what, f"has half a surrogate pair ({near}), which is no character: write it whole")
        return text

    def refusal(self, what: str, state: str) -> ValueError:
        return ValueError(f"{self.where}: its {what}, field {getattr(self.names, what)!r}, {state}")


def _as_text(value: Any) -> str | None:
    """`value` as JSON writes it; "" for null, None for what is neither a text nor a number nor true nor false."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    is_number = isinstance(value, (Real, Decimal)) and math.isfinite(value)
    return str(value) if isinstance(value, str) or is_number else None


def _description(value: Any) -> str:
    if isinstance(value, (Real, Decimal)):
        return f"is {value}"
    kind = {list: "a list, ", dict: "an object, "}.get(type(value), f"of type {type(value).__name__}, ")
    return f"is {kind}{repr(value)[:60]}"
