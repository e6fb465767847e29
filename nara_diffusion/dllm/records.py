"""Read records from files or the Hub, as questions with their answers.

The fields of the first record decide the form, by their usual names or by names from the user:

    {"messages": [{"role": "user", "content": …}, …]}    a conversation; also "conversations",
                                                         "from" and "value"
    {"instruction": …, "input": …, "output": …, "answer": …}    as in Alpaca and LLM-Adapters
    {"prompt": …, "completion": …}    also "question"; "response" or "answer"
    {"text": …}    a text without a prompt

A generation is compared with `answer`, or with the whole output if there is no such field. Fields
hold texts, numbers, true or false.

`datasets` loads and caches all records. JSON is loaded as lines of text and parsed here, since the
JSON reader of `datasets` turns the text "2024-01-02" into a date and 1.50 into 1.5, and its errors
name neither the file nor the line. For the same reason, all columns of a CSV file are read as text.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

_BLANK = "\ufeff \t"
"""The characters of a blank line: white space and the byte order mark."""
FIELDS = {
    "messages": ("messages", "conversations"),
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "completion", "response", "answer"),
    "answer": ("answer",),
    "text": ("text",),
}
TEXTS = ("instruction", "input", "output", "answer")
# (required fields of a form, optional fields)
_FORMS = (
    (("messages",), ("answer",)),
    (("instruction", "output"), ("input", "answer")),
    (("text",), ()),
)
_EXPECTED = (
    "messages or conversations, or a question (instruction, prompt or question) and its answer "
    "(output, completion, response or answer), or text"
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", *_ROLES)
# Fractions are kept as written in the file, and NaN counts as missing.
_JSON = json.JSONDecoder(parse_float=str, parse_constant=lambda _: None)

BATCH = 1000  # records in one call
_MAKE_ROWS = ("records", "encoding", "tokenizer")  # the modules that make rows


def read_records(
    name: str | Path,
    fields: Mapping[str, str] | None = None,
    *,
    config: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read the records (texts by field) of a file, a folder, or a data set on the Hub.

    A file is a JSON list, JSON Lines or CSV, gzipped or not, or parquet.

    Args:
        name: a name with a suffix, or one that begins with . or / or ~, is a file or folder and is
            never looked for on the Hub. Any other name is a folder or a data set on the Hub, and
            may end in :SPLIT (default: train).
        fields: {"messages", "instruction", "input", "output", "text" or "answer": the name of this
            field in the records}.
        config: the configuration of a data set on the Hub.
        limit: the number of records to take from the start; None takes all.

    Returns:
        A Dataset of the texts `instruction`, `input`, `output` and `answer`. Conversations also
        have `turns`, a list of {role, content} before the output, empty if that is only the
        instruction. `info.description` of the Dataset names the source and the form.

    Raises:
        ValueError: the source can't be read, is empty or is corrupt (the message has the line); the
            first record has no known form; or a field of another record is missing or isn't text
            (the message has the number of the record).
    """
    from datasets import load_dataset

    path = Path(name).expanduser()
    is_path = str(name).startswith((".", "/", "~")) or re.match(r"\.[A-Za-z]", path.suffix)
    if not path.exists() and is_path:
        raise ValueError(f"there is no file {path}")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} holds no records")
    source = str(path) if path.exists() else f"{path} on the Hub (there is no {path} here)"
    try:
        if path.is_file():
            kind, options = _file_options(path)
        else:
            kind, _, split = str(path).partition(":")
            options = {"name": config, "split": split or "train"}
        rows = cast("Dataset", load_dataset(kind, **options))
    except Exception as error:  # `datasets` has a dozen classes for "not found"
        raise ValueError(f"{source} can't be read: {error.__cause__ or error}") from error
    return _records(rows, fields or {}, source, limit, is_json=kind == "text")


def _file_options(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the builder of `datasets` for a file, and the builder's options."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    kind = {".parquet": "parquet", ".csv": "csv"}.get(suffix, "text")
    options: dict[str, Any] = {"data_files": glob.escape(str(path.absolute())), "split": "train"}
    if kind == "csv":
        options |= _csv_options(path)
    return kind, options


def _csv_options(path: Path) -> dict[str, Any]:
    """Return options that read each column of a CSV file as text, and an empty field as ""."""
    from datasets import Features, Value

    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    return {"features": Features({name: Value("string") for name in header}), "na_filter": False}


def normalized(records: Iterable[Mapping[str, Any]], *, source: str) -> Dataset:
    """Return `records` as `read_records` would return them from a file named `source`."""
    from datasets import Dataset

    lines = [json.dumps(record) for record in records]
    return _records(Dataset.from_dict({"text": lines}), {}, source, None, is_json=True)


def _records(
    rows: Dataset, fields: Mapping[str, str], source: str, limit: int | None, *, is_json: bool
) -> Dataset:
    """Return the records in the rows that `datasets` loaded, a table of fields or JSON lines."""
    from datasets import Features, List, Value

    is_list = is_json and "".join(rows[:BATCH]["text"]).lstrip(_BLANK).startswith("[")
    kind = "list" if is_list else "lines" if is_json else "table"
    size = len(rows) if is_list else BATCH
    first = next(_RecordReader(source, kind, {}).numbered(rows[:size], range(size)), None)
    if first is None:
        raise ValueError(f"{source} holds no records")
    where, record = first
    reader = _RecordReader(source, kind, _field_names(record, fields, where))
    features: dict[str, Any] = dict.fromkeys(TEXTS, Value("string"))
    if "messages" in reader.names:
        features["turns"] = List({"role": Value("string"), "content": Value("string")})
    records = mapped(rows, reader, vars(reader), Features(features), batch_size=size, desc="read")
    named = [name if name == what else f"{name} as {what}" for what, name in reader.names.items()]
    records.info.description = f"{source} (fields {', '.join(named)})"
    return records if limit is None else records.select(range(min(limit, len(records))))


def mapped(
    rows: Dataset,
    function: Callable[..., Any],
    key: object,
    features: Features,
    *,
    batch_size: int,
    desc: str,
) -> Dataset:
    """Return `rows.map` over batches and their indices, in several processes if that is faster.

    The cache key on disk consists of the rows, `key`, and the code of the modules that make rows.
    The cache of `datasets` itself doesn't notice changed code in an installed package, and mistakes
    a tokenizer that has merely been used for a changed one.
    """
    from datasets.fingerprint import Hasher

    code = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in _MAKE_ROWS]
    workers = min(os.cpu_count() or 1, len(rows) // max(batch_size, 10 * BATCH))
    return rows.map(
        function,
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        remove_columns=rows.column_names,
        features=features,
        num_proc=workers if workers > 1 else None,
        new_fingerprint=Hasher.hash([rows._fingerprint, key, code]),
        desc=desc,
    )


def column_batches(rows: Dataset, names: Sequence[str], format: str | None = None) -> Iterator[Any]:
    """Yield batches of the columns `names`, as dicts, or as pyarrow tables with format "arrow"."""
    yield from rows.select_columns(list(names)).with_format(format).iter(BATCH)


def with_column(rows: Dataset, name: str, values: Iterable[Any]) -> Dataset:
    """Return `rows` with one more column."""
    untyped: Any = rows  # a decorator of `datasets` fills an argument that its signature requires
    return untyped.add_column(name, values)


# ---------------------------------------------------------------- forms of records


def _field_names(record: object, given: Mapping[str, str], where: str) -> dict[str, str]:
    """Return {what: field name} for the form of `record`. Names from the user replace usual ones.

    Raises:
        ValueError: the record has no known form.
    """
    present = list(record) if isinstance(record, Mapping) else []
    found: dict[str, str] = {}
    for what, usual in FIELDS.items():
        names = [name for name in usual if name in present]
        found[what] = given.get(what, names[0] if names else "")
    for needed, optional in _FORMS:
        form = (*needed, *optional)
        if given.keys() <= set(form) and all(found[what] in present for what in needed):
            return {what: name for what, name in found.items() if name and what in form}
    fields = ", ".join(map(str, present)) or f"none, it is {repr(record)[:60]}"
    raise ValueError(
        f"{where} has the fields {fields}; expected {dict(given) or _EXPECTED}: name them with "
        "--messages_field NAME, or --instruction_field NAME --output_field NAME, "
        "or --text_field NAME"
    )


@dataclass(frozen=True)
class _RecordReader:
    """Turn a batch that `datasets` loaded into a batch of records.

    Attributes:
        source: the name of the file or data set, for messages.
        kind: "table" if rows have the fields, "lines" if each line of text is a JSON object, or
            "list" if all lines together are one JSON list.
        names: {what: field name}.
    """

    source: str
    kind: str
    names: Mapping[str, str]

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in TEXTS}
        if "messages" in self.names:
            columns["turns"] = []
        for where, record in self.numbered(batch, indices):
            row = self.row(record, where)
            for name, column in columns.items():
                column.append(row[name])
        return columns

    def numbered(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name for messages, record) for each record of a batch."""
        for index, record in self._parsed_records(batch, indices):
            yield f"record {index + 1} of {self.source}", record

    def _parsed_records(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        if self.kind == "list":
            yield from enumerate(self.parsed("\n".join(batch["text"]), 1))
        elif self.kind == "lines":
            for index, line in zip(indices, batch["text"], strict=False):
                if line.strip(_BLANK):
                    yield index, self.parsed(line, index + 1)
        else:
            rows = zip(*batch.values(), strict=True)
            for index, values in zip(indices, rows, strict=False):
                yield index, dict(zip(batch, values, strict=True))

    def parsed(self, text: str, line: int) -> Any:
        """Return the JSON value of a text that begins at line `line`.

        Raises:
            ValueError: the text isn't JSON.
        """
        try:
            return _JSON.decode(text.lstrip("\ufeff"))
        except json.JSONDecodeError as error:
            place = f"line {line + error.lineno - 1}, column {error.colno}"
            raise ValueError(
                f"{self.source} breaks at {place}: {error.msg}. Each line has to hold one whole "
                "object; a list over several lines has to start with ["
            ) from None

    def row(self, record: object, where: str) -> dict[str, Any]:
        """Return {instruction, input, output, answer} of a record, with `turns` if it has turns.

        Raises:
            ValueError: the record doesn't have the form of the first record.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: expected an object, found {repr(record)[:60]}")
        if "messages" in self.names:
            row = self._conversation(record, where)
        elif "text" in self.names:
            row = {"instruction": "", "input": "", "output": self.text(record, "text", where)}
        else:
            names = ("instruction", "input", "output")
            row = {what: self.text(record, what, where) for what in names}
        row["answer"] = row["output"]
        if "answer" in self.names:
            row["answer"] = self.text(record, "answer", where).strip()
        return row

    def _conversation(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        name = self.names["messages"]
        if record.get(name) is None:
            found = f"has no {name}, it has {', '.join(record)}"
            if name in record:
                found = f"has null as its {name}"
            raise ValueError(
                f"{where} {found}: the first record decides the form of all, so put other forms "
                "into their own files"
            )
        return _read_conversation(record[name], f"{where}, field {name!r}")

    def text(self, record: Mapping[str, Any], what: str, where: str) -> str:
        """Return the text of a field. White space is kept, as it may be indentation of code.

        Raises:
            ValueError: the field is missing, empty or not text. `input` may be missing or empty.
        """
        name = self.names.get(what)
        value = record.get(name, "") if name else ""
        if isinstance(value, float) and math.isnan(value):
            value = None  # a missing value in Parquet
        if not isinstance(value, str | int | float | None):
            raise ValueError(
                f"{where}: its {what}, field {name!r}, is {repr(value)[:60]}: "
                "expected a text or a number"
            )
        text = "" if value is None else str(value)
        if isinstance(value, bool):
            text = text.lower()
        if not text.strip() and what != "input":
            raise ValueError(
                f"{where}: its {what}, field {name!r}, is missing or empty; it has "
                f"{', '.join(record)}, and the first record decides the form: "
                f"--{what}_field NAME gives another name"
            )
        return text


def _read_conversation(messages: object, where: str) -> dict[str, Any]:
    """Return the record of a list of messages. Messages after the assistant's last are dropped.

    Raises:
        ValueError: a message isn't {role, content}, or a user's message or its answer is missing.
    """
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        turns.append(_turn(message, where))
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    questions = [turn["content"] for turn in turns if turn["role"] == "user"]
    if not questions or not turns[-1]["content"].strip():
        raise ValueError(
            f"{where}: expected a user's message and the assistant's answer, "
            f"found {messages!r:.100}"
        )
    *before, answer = turns
    return {
        "turns": before if len(before) > 1 else [],  # a single user message is the instruction
        "instruction": questions[-1],
        "input": "",
        "output": answer["content"],
    }


def _turn(message: object, where: str) -> dict[str, str]:
    known = message if isinstance(message, Mapping) else {}
    role = known.get("role", known.get("from"))
    content = known.get("content", known.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        why = ": content has to be a text" if isinstance(role, str) else ""
        raise ValueError(
            f"{where}: expected a list of {{role, content}} or {{from, value}}, "
            f"found {message!r:.60}{why}"
        )
    if role not in _KNOWN_ROLES:
        expected = ", ".join(_KNOWN_ROLES)
        raise ValueError(f"{where}: the role {role!r} is unknown, expected one of {expected}")
    return {"role": _ROLES.get(role, role), "content": content}
