"""Questions and answers of many forms, from files or the Hub, as one: Datasets of texts that `encoding` tokenises.

The first record shows the form, by the usual names of its fields or by names that are given:

    {"messages": [{"role": "user", "content": …}, …]}    a conversation; also "conversations", "from" and "value"
    {"instruction": …, "input": …, "output": …, "answer": …}    as Alpaca and LLM-Adapters have it
    {"prompt": …, "completion": …}    also "question"; "response" or "answer"
    {"text": …}    a text that no prompt stands before

`answer` is what a generation is compared with, and is the whole output where there is none. Fields hold texts, numbers,
true or false. `datasets` loads and caches all of it. JSON it loads as lines of text, which are parsed here: its own
JSON reader makes a date of the text "2024-01-02" and 1.5 of 1.50, and names neither file nor line of what is broken.
All columns of a CSV file are texts, for the same reason.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000  # records of one call
# fractions stay as the file writes them, and NaN counts as missing
_JSON = json.JSONDecoder(parse_float=str, parse_constant=lambda _: None)
FIELDS = {
    "messages": ("messages", "conversations"),
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "completion", "response", "answer"),
    "answer": ("answer",),
    "text": ("text",),
}
_FORMS = {
    ("messages",): ("answer",),
    ("instruction", "output"): ("input", "answer"),
    ("text",): (),
}  # needed: may be
_EXPECTED = (
    "messages or conversations, or a question (instruction, prompt or question) and its answer (output, completion, "
    "response or answer), or text"
)
_TEXTS = ("instruction", "input", "output", "answer")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", *_ROLES)


def read_records(
    name: str | Path,
    fields: Mapping[str, str] | None = None,
    *,
    config: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """The records of a file (JSON list, JSON Lines or CSV, gzipped or not, or parquet), a folder, or a data set on the
    Hub.

    A Dataset of texts `instruction`, `input`, `output`, `answer`; conversations have `turns` too, what stands before
    the output as {role, content}, empty where that is the instruction alone. Its `info.description` names the source
    and the form.

    Args:
        name: what has a suffix, or begins with . or / or ~, is a file or folder, and never asked of the Hub; any other
            name is that of a folder or of a data set on the Hub, and may end in :SPLIT (default: train).
        fields: {"messages", "instruction", "input", "output", "text" or "answer": the name of its field}.
        config: configuration of a data set on the Hub.
        limit: take the first so many records.

    Raises:
        ValueError: it can't be read, is empty or broken (with the line); the first record has no known form; another
            lacks a field, or holds something there that is no text (with its number, which is that of its line).
    """
    from datasets import load_dataset

    path = Path(name).expanduser()
    if not path.exists() and (
        str(name).startswith((".", "/", "~")) or re.match(r"\.[A-Za-z]", path.suffix)
    ):
        raise ValueError(f"there is no file {path}")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} holds no records")
    kind, _, split = str(path).partition(":")
    options: dict[str, Any] = {"name": config, "split": split or "train"}
    source = str(path) if path.exists() else f"{path} on the Hub (there is no {path} here)"
    try:
        if path.is_file():
            kind = {".parquet": "parquet", ".csv": "csv"}.get(
                Path(path.name.removesuffix(".gz")).suffix, "text"
            )
            options = {"data_files": glob.escape(str(path.absolute())), "split": "train"}
            if kind != "parquet":
                _check_encoding(path)
            options |= _texts_of_csv(path) if kind == "csv" else {}
        rows = load_dataset(kind, **options)
    except (
        Exception
    ) as error:  # whatever `datasets` raises: it has a dozen classes for "not found" alone
        raise ValueError(f"{source} can't be read: {error.__cause__ or error}") from error
    return _records(rows, fields or {}, source, limit, is_json=kind == "text")  # type: ignore[arg-type]


def _texts_of_csv(path: Path) -> dict[str, Any]:
    """The options by which `datasets` reads each column of a CSV file as text, and an empty field as an empty one."""
    from datasets import Features, Value

    with _opened(path) as file:
        header = next(csv.reader(line.decode("utf-8-sig") for line in file), [])
    return {"features": Features({name: Value("string") for name in header}), "na_filter": False}


def _check_encoding(path: Path) -> None:
    """Raises ValueError with the first line of a text file that isn't UTF-8."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                is_text = "\0" not in line.decode()  # UTF-16 has zero bytes
            except UnicodeDecodeError:
                is_text = False
            if not is_text:
                raise ValueError(
                    f"line {number} isn't UTF-8 (UTF-16 or Latin-1, perhaps): save it as UTF-8"
                )


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def normalized(records: Iterable[Mapping[str, Any]], *, source: str) -> Dataset:
    """`records` as those of a file, which messages call `source`. Raises ValueError as `read_records`."""
    from datasets import Dataset

    lines = [json.dumps(record) for record in records]
    return _records(Dataset.from_dict({"text": lines}), {}, source, None, is_json=True)


def _records(
    rows: Dataset, fields: Mapping[str, str], source: str, limit: int | None, *, is_json: bool
) -> Dataset:
    """What `datasets` has loaded, tables of the fields or lines of JSON, as records."""
    from datasets import Features, List, Value

    is_list = is_json and "".join(rows[:BATCH]["text"]).lstrip("\ufeff \t").startswith("[")
    kind = "list" if is_list else "lines" if is_json else "table"
    if limit is not None and not is_list:
        lines = rows["text"] if is_json else ()
        records = (
            (i for i, line in enumerate(lines) if line.strip("\ufeff \t"))
            if is_json
            else range(len(rows))
        )
        rows = rows.select(range(1 + next(islice(records, limit - 1, None), len(rows) - 1)))
    size = len(rows) if is_list else BATCH
    first = next(_Reader(source, kind, {}).numbered(rows[:size], range(size)), None)
    if first is None:
        raise ValueError(f"{source} holds no records")
    reader = _Reader(source, kind, _form(first[1], fields, first[0]))
    features: dict[str, Any] = dict.fromkeys(_TEXTS, Value("string"))
    if "messages" in reader.names:
        features["turns"] = List({"role": Value("string"), "content": Value("string")})
    records = mapped(rows, reader, vars(reader), Features(features), batch_size=size, desc="read")
    named = (name if name == what else f"{name} as {what}" for what, name in reader.names.items())
    records.info.description = f"{source} (fields {', '.join(named)})"
    return records if limit is None else records.select(range(min(limit, len(records))))


def _form(record: Any, given: Mapping[str, str], where: str) -> dict[str, str]:
    """{what: the name of its field}, of the form that `record` has. Raises ValueError if it has none."""
    present = list(record) if isinstance(record, Mapping) else []
    usual = {
        what: next((name for name in names if name in present), None)
        for what, names in FIELDS.items()
    }
    for needed, more in _FORMS.items():
        names = {what: given.get(what, usual[what]) for what in (*needed, *more)}
        if given.keys() <= names.keys() and all(names[what] in present for what in needed):
            return {what: name for what in FIELDS if (name := names.get(what))}
    raise ValueError(
        f"{where} has the fields {', '.join(map(str, present)) or f'none, it is {repr(record)[:60]}'}; expected "
        f"{dict(given) or _EXPECTED}: name them by "
        "--data_options messages_field=NAME, or instruction_field=NAME output_field=NAME, or text_field=NAME"
    )


def mapped(
    rows: Dataset,
    function: Callable[..., Any],
    key: Any,
    features: Any,
    *,
    batch_size: int,
    desc: str,
) -> Dataset:
    """`rows.map` of batches and their indices, in as many processes as pay.

    Its result is cached on disk under what the rows are, `key`, and the code that makes it: `datasets` itself wouldn't
    see a change in the code of an installed package, and sees one in a tokenizer that was only used.
    """
    from datasets.fingerprint import Hasher

    code = [
        Path(__file__).with_name(f"{name}.py").read_bytes()
        for name in ("records", "encoding", "canvas")
    ]
    workers = min(os.cpu_count() or 1, len(rows) // max(batch_size, 10 * BATCH))
    options: dict[str, Any] = {
        "batched": True,
        "batch_size": batch_size,
        "with_indices": True,
        "features": features,
    }
    options |= {
        "remove_columns": rows.column_names,
        "num_proc": workers if workers > 1 else None,
        "desc": desc,
    }
    return rows.map(
        function, new_fingerprint=Hasher.hash([rows._fingerprint, key, code]), **options
    )


@dataclass(frozen=True)
class _Reader:
    """Makes batches of what `datasets` has loaded to batches of records.

    Attributes:
        kind: "table" of the fields; "lines" of text with an object of JSON each; "list", which its lines are together.
        names: {what: the name of its field}.
    """

    source: str
    kind: str
    names: Mapping[str, str]

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        rows = [self.row(record, where) for where, record in self.numbered(batch, indices)]
        return {
            what: [row[what] for row in rows]
            for what in (*_TEXTS, *["turns"] * ("messages" in self.names))
        }

    def numbered(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> Iterator[tuple[str, Any]]:
        """(what messages call it, record)"""
        if self.kind == "list":
            found = enumerate(self.parsed("\n".join(batch["text"]), 1))
        elif self.kind == "lines":
            lines = zip(indices, batch["text"], strict=False)
            found = ((i, self.parsed(line, i + 1)) for i, line in lines if line.strip("\ufeff \t"))
        else:
            columns = zip(*batch.values(), strict=True)
            found = (
                (i, dict(zip(batch, row, strict=True)))
                for i, row in zip(indices, columns, strict=False)
            )
        yield from ((f"record {i + 1} of {self.source}", record) for i, record in found)

    def parsed(self, text: str, line: int) -> Any:
        """The JSON of a text that begins in this line."""
        try:
            return _JSON.decode(text.lstrip("\ufeff"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.source} breaks at line {line + error.lineno - 1}, column {error.colno}: {error.msg}. Each line "
                "has to hold one whole object; a list over several lines has to start with ["
            ) from None
        except (
            ValueError,
            RecursionError,
        ) as error:  # Python's limit of digits, and of nested brackets
            why = (
                "nested too deeply"
                if isinstance(error, RecursionError)
                else f"too large a number ({error})"
            )
            raise ValueError(
                f"{self.source} can't be read at line {line}: {why}; take the record out"
            ) from None

    def row(self, record: Any, where: str) -> dict[str, Any]:
        """A record as one of `read_records`."""
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: expected an object, found {repr(record)[:60]}")
        if "messages" in self.names and record.get(name := self.names["messages"]) is None:
            found = (
                f"has null as its {name}"
                if name in record
                else f"has no {name}, it has {', '.join(record)}"
            )
            raise ValueError(
                f"{where} {found}: the first record decides the form of all, so put other forms into files of their own"
            )
        row: dict[str, Any]
        if "messages" in self.names:
            row = _conversation(
                record.get(self.names["messages"]), f"{where}, field {self.names['messages']!r}"
            )
        elif "text" in self.names:
            row = {"instruction": "", "input": "", "output": self.text(record, "text", where)}
        else:
            row = {
                what: self.text(record, what, where) for what in ("instruction", "input", "output")
            }
        row |= {
            "answer": self.text(record, "answer", where).strip()
            if "answer" in self.names
            else row["output"]
        }
        texts = [row.get(name) or "" for name in _TEXTS]
        try:
            "".join([*texts, *(turn["content"] for turn in row.get("turns", []))]).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} has half a character, {error.object[error.start]!r}: write it whole"
            ) from None
        return row

    def text(self, record: Mapping[str, Any], what: str, where: str) -> str:
        """The text of a field, unchanged: white space at the start of an output can be Python's."""
        name = self.names.get(what)
        value = record.get(name, "") if name else ""
        value = (
            None if isinstance(value, float) and math.isnan(value) else value
        )  # what Parquet has for a missing one
        if not isinstance(value, str | int | float | None):
            raise ValueError(
                f"{where}: its {what}, field {name!r}, is {repr(value)[:60]}: expected a text or a number"
            )
        text = (
            "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        )
        if not text.strip() and what != "input":
            raise ValueError(
                f"{where}: its {what}, field {name!r}, is missing or empty; it has {', '.join(record)}, and "
                f"the first record decides the form: --data_options {what}_field=NAME gives another name"
            )
        return text


def _conversation(messages: Any, where: str) -> dict[str, Any]:
    """The record of a list of messages; those after the assistant's last are left out."""
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        known = message if isinstance(message, Mapping) else {}
        role, content = (
            known.get("role", known.get("from")),
            known.get("content", known.get("value")),
        )
        if not isinstance(role, str) or not isinstance(content, str):
            why = ": content has to be a text" if isinstance(role, str) else ""
            expected = "expected a list of {role, content} or {from, value}"
            raise ValueError(f"{where}: {expected}, found {message!r:.60}{why}")
        if role not in _KNOWN_ROLES:
            raise ValueError(
                f"{where}: the role {role!r} is unknown, expected one of {', '.join(_KNOWN_ROLES)}"
            )
        turns.append({"role": _ROLES.get(role, role), "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    questions = [turn["content"] for turn in turns if turn["role"] == "user"]
    if not questions or not turns[-1]["content"].strip():
        raise ValueError(
            f"{where}: expected a user's message and the assistant's answer, found {messages!r:.100}"
        )
    *before, answer = turns
    return {
        "turns": [] if len(before) == 1 else before,  # a user's message alone
        "instruction": questions[-1],
        "input": "",
        "output": answer["content"],
    }
