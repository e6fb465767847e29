"""Questions and answers in the form of the LLM-Adapters data sets, from files or by `datasets`.

A JSON file is a list of objects or JSON Lines, one object a line, gzipped or not, each like

    {"instruction": "What is 2 + 3?", "output": "2 + 3 = 5. The answer is 5.", "answer": "5"}

`instruction` is the question, with an optional `input` as its second part, `output` what the model learns to write, and
`answer` what a generation is compared with. Files without any `answer` are compared by their whole `output`. These
fields hold texts, numbers, true or false; other fields are not read.

JSON files are read here and not by `datasets`, which makes 1.5 of "1.50" and doesn't name the line that is broken.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_MOST_HELD_OUT = 128  # records for validation, of which a tenth is taken where no number is given


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
    return normalized(_json_objects(Path(path)), fields, source=str(path))


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
        held_out = args.validation_samples or max(1, min(_MOST_HELD_OUT, len(records) // 10))
        if len(records) - held_out < held_out:
            raise ValueError(
                f"{len(records)} training records can't spare {held_out} for validation, which leaves "
                f"{max(len(records) - held_out, 0)} to train on: lower validation_samples, or give a validation_file."
            )
        parts = records.train_test_split(test_size=held_out, seed=args.seed)
        records, validation = parts["train"], parts["test"]
    test = validation if args.test_file is None else records_from_file(args.test_file, fields)
    return records, validation, test.select(range(min(len(test), args.test_samples or len(test))))


def normalized(records: Iterable[Mapping[str, Any]], fields: FieldNames = FieldNames(), *, source: str) -> Dataset:
    """Check `records`, and rename their fields to those of this module. Messages call them `source`.

    Raises:
        ValueError: there are none, or see `records_from_file`.
    """
    from datasets import Dataset

    rows = [
        {what: _text(record, what, name, f"record {n} of {source}") for what, name in vars(fields).items()}
        for n, record in enumerate(records, 1)
    ]
    if not rows:
        raise ValueError(f"{source} holds no records")
    answered = any(row["answer"].strip() for row in rows)
    for n, row in enumerate(rows, 1):
        row["answer"] = row["answer"].strip() if answered else row["output"]
        for what in ("instruction", "output", "answer"):
            if not row[what].strip():
                name = getattr(fields, what)
                raise ValueError(f"record {n} of {source}: its {what}, field {name!r}, is missing or empty")
    return Dataset.from_list(rows)


def _text(record: Any, what: str, name: str, where: str) -> str:
    """The text of a field, unchanged: white space at the start of an output can be Python's. "" if there is none."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object, found {repr(record)[:60]}")
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where}: its {what}, field {name!r}, is {repr(value)[:60]}: expected a text or a number")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json_objects(path: Path) -> list[Any]:
    """The objects of a JSON list or of JSON Lines; fractions stay texts, as the file writes them."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    # only a line feed ends a line: JSON's texts may hold the other line separators
    parts = [(1, text)] if text.lstrip().startswith("[") else list(enumerate(text.split("\n"), 1))
    found = []
    for line, part in parts:
        try:
            found += [json.loads(part, parse_float=str)] if part.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} breaks at line {line + error.lineno - 1}, column {error.colno}: {error.msg}. Each line has to "
                "hold one whole object; a list over several lines has to start with ["
            ) from None
    return found[0] if len(parts) == 1 and found and isinstance(found[0], list) else found
