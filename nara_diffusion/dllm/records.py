"""Questions and answers from JSON files, in the form of the LLM-Adapters data sets.

A file is a JSON list of objects or JSON Lines, one object a line, each like

    {"instruction": "What is 2 + 3?", "output": "2 + 3 = 5. The answer is 5.", "answer": "5"}

`instruction` is the question, with an optional `input` as its second part, `output` what the model learns to write, and
`answer` what a generation is compared with. Files without any `answer` are compared by their whole `output`.

`datasets` is imported where it is needed, since training and evaluation need it and generation doesn't.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class FieldNames:
    """What a file calls its fields."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    answer: str = "answer"


def records_from_file(path: str | Path, fields: FieldNames = FieldNames()) -> Dataset:
    """The records of a JSON or JSON Lines file: a Dataset of strings `instruction`, `input`, `output`, `answer`.

    Raises:
        ValueError: no such file, an empty one, no UTF-8, JSON that breaks (with the line), a record without
            instruction, output or answer (with its number).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: pass a JSON or JSON Lines file of {{instruction, output, answer}}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text (byte {error.start}: {error.reason})") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: it has to hold one record at least")
    return normalized(_parse(text, path), fields, source=str(path))


def records_from_hub(path: str, *, split: str = "train", fields: FieldNames = FieldNames(), **kwargs: Any) -> Dataset:
    """The same from a data set on the Hub, or a folder that `datasets` reads; kwargs as for `datasets.load_dataset`.

    Raises:
        ValueError: it can't be loaded; a record without instruction, output or answer (with its number).
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(path, split=split, **kwargs)
    except Exception as error:  # whatever `datasets` raises: it has a dozen classes for "not found" alone
        raise ValueError(f"the data set {path} ({split}) can't be loaded: {error}") from error
    return normalized(rows, fields, source=f"{path} ({split})")


def normalized(records: Iterable[Mapping[str, Any]], fields: FieldNames = FieldNames(), *, source: str) -> Dataset:
    """`records` under the names of this module, checked, as a Dataset. `source` is what messages call them."""
    from datasets import Dataset

    rows = [dict(record) for record in records]
    if not rows:
        raise ValueError(f"{source} holds no records")
    answered = any(_text(row.get(fields.answer)).strip() for row in rows)
    return Dataset.from_list(
        [_normal(row, fields, answered, f"record {n} of {source}") for n, row in enumerate(rows, 1)]
    )


def _normal(row: Mapping[str, Any], fields: FieldNames, answered: bool, where: str) -> dict[str, str]:
    def required(name: str, what: str) -> str:
        value = _text(row.get(name))
        if not value.strip():
            state = "is empty" if name in row else f"is missing; the record has {', '.join(row) or 'no fields'}"
            raise ValueError(f"{where}: its {what}, field {name!r}, {state}")
        return value

    output = required(fields.output, "output")
    return {
        "instruction": required(fields.instruction, "instruction"),
        "input": _text(row.get(fields.input)),
        "output": output,
        "answer": required(fields.answer, "answer").strip() if answered else output,
    }


def _text(value: Any) -> str:
    """As it stands: white space at the start of an output can be Python's."""
    return "" if value is None else str(value)


def _parse(text: str, path: Path) -> list[dict[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} breaks at line {error.lineno}, column {error.colno}: {error.msg}") from None
        numbered = [(f"record {n}", row) for n, row in enumerate(rows, 1)]
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                numbered.append((f"line {number}", _parse_line(line, number, path)))
    for where, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {where}: expected an object, found {json.dumps(row)[:60]}")
    return [row for _, row in numbered]


def _parse_line(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} breaks at line {number}, column {error.colno}: {error.msg}. Each line has to hold one whole "
            "object; a list over several lines has to start with ["
        ) from None
