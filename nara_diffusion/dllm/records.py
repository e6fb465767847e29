"""Read records from files or the Hub, as questions with their answers.

The fields of the first record decide the form, by their usual names or by names from the user
(`record_forms`).

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
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .record_forms import BLANK, RecordReader, field_names

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

BATCH = 1000  # records in one call
_MAKE_ROWS = ("records", "record_forms", "encoding", "tokenizer")  # the modules that make rows


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
            never looked for on the Hub. Any other name is a folder or a data set on the Hub. A
            folder or data set may end in :SPLIT (default: train).
        fields: {"messages", "instruction", "input", "output", "text" or "answer": the name of this
            field in the records}; `record_forms.PAIR_FIELDS` for preference pairs.
        config: the configuration of a data set on the Hub.
        limit: the number of records to take from the start; None takes all.

    Returns:
        A Dataset of the texts `instruction`, `input`, `output` and `answer`. Conversations also
        have `turns`, a list of {role, content} before the output, empty if that is only the
        instruction. Preference pairs have `turns` and `rejected`, too; their output is the chosen
        answer. `info.description` of the Dataset names the source and the form.

    Raises:
        ValueError: the source can't be read, is empty or is corrupt (the message has the line); the
            first record has no known form; or a field of another record is missing or isn't text
            (the message has the number of the record).
    """
    from datasets import load_dataset

    source = str(Path(name).expanduser())
    path, split = Path(source), "train"
    folder, _, part = source.partition(":")
    if not path.exists() and not Path(folder).is_file():
        path, split = Path(folder), part or split
    is_path = str(name).startswith((".", "/", "~")) or re.match(r"\.[A-Za-z]", path.suffix)
    if not path.exists():
        if is_path:
            raise ValueError(f"there is no file {path}")
        source = f"{source} on the Hub (there is no {source} here)"
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} holds no records")
    try:
        if path.is_file():
            kind, options = _file_options(path)
        else:
            kind, options = str(path), {"name": config, "split": split}
        rows = cast("Dataset", load_dataset(kind, **options))
    except Exception as error:  # `datasets` has a dozen classes for "not found"
        cause = error.__cause__ or error
        remedy = ": save it as UTF-8" if isinstance(cause, UnicodeDecodeError) else ""
        raise ValueError(f"{source} can't be read: {cause}{remedy}") from error
    return _records(rows, fields or {}, source, limit, is_json=kind == "text")


def _file_options(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the builder of `datasets` for a file, and the builder's options.

    All columns of a CSV file are read as text, and an empty field as "".
    """
    from datasets import Features, Value

    suffix = Path(path.name.removesuffix(".gz")).suffix
    kind = {".parquet": "parquet", ".csv": "csv"}.get(suffix, "text")
    options: dict[str, Any] = {"data_files": glob.escape(str(path.absolute())), "split": "train"}
    if kind != "csv":
        return kind, options
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    if len(header) == 1 and (separator := re.search("[;\t]", header[0])):
        raise ValueError(f"its columns are separated by {separator[0]!r}: save it with commas")
    features = Features({name: Value("string") for name in header})
    return kind, {**options, "features": features, "na_filter": False}


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

    is_list = is_json and "".join(rows[:BATCH]["text"]).lstrip(BLANK).startswith("[")
    kind = "list" if is_list else "lines" if is_json else "table"
    size = len(rows) if is_list else BATCH
    first = next(RecordReader(source, kind, {}).numbered(rows[:size], range(size)), None)
    if first is None:
        raise ValueError(f"{source} holds no records")
    where, record = first
    reader = RecordReader(source, kind, field_names(record, fields, where))
    features = Features(dict.fromkeys(reader.columns, Value("string")))
    if "turns" in features:
        features["turns"] = List({"role": Value("string"), "content": Value("string")})
    records = mapped(rows, reader, vars(reader), features, batch_size=size, desc="read")
    named = [name if name == part else f"{name} as {part}" for part, name in reader.names.items()]
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


def column_batches(rows: Dataset, names: Sequence[str]) -> Iterator[Any]:
    """Yield batches of the columns `names` as pyarrow tables."""
    yield from rows.select_columns(list(names)).with_format("arrow").iter(BATCH)


def with_column(rows: Dataset, name: str, values: Iterable[Any]) -> Dataset:
    """Return `rows` with one more column."""
    untyped: Any = rows  # a decorator of `datasets` fills an argument that its signature requires
    return untyped.add_column(name, values)
