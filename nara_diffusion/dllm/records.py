"""Records: read from files or the Hub, and divided into training, validation and test.

`record_forms` describes the forms. `datasets` loads and caches all records. It loads JSON as lines
of text, which are parsed here: its own JSON reader makes a date of the text "2024-01-02" and 1.5 of
1.50, and its errors name neither the file nor the line. All columns of a CSV file are texts, for
the same reason.

Without a validation file, some records are held out of training. Equal records count once there:
copies of held-out records are left out of training.
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
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from .record_forms import BLANK, FIELDS, TEXTS, RecordReader, field_names

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from .text_arguments import Arguments

logger = logging.getLogger(__name__)

BATCH = 1000  # records of one call
_MOST_HELD_OUT = 128  # records, at most, of the tenth that is held out by default
_TRAINED_ON = ("instruction", "input", "output", "turns")
_MAKE_ROWS = ("records", "record_forms", "encoding", "tokenizer")  # modules


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
        fields: {"messages", "instruction", "input", "output", "text" or "answer": its field's
            name}.
        config: configuration of a data set on the Hub.
        limit: take this many records from the start.

    Returns:
        A Dataset of the texts `instruction`, `input`, `output` and `answer`. Conversations also
        have `turns`, {role, content} each: all before the output, or none if that is only the
        instruction. Its `info.description` names the source and the form.

    Raises:
        ValueError: the source can't be read, is empty, or is broken (with the line); the first
            record has no known form; another record lacks a field or has no text there (with its
            number).
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
    """Return the builder of `datasets` for a file, and its options."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    kind = {".parquet": "parquet", ".csv": "csv"}.get(suffix, "text")
    options: dict[str, Any] = {"data_files": glob.escape(str(path.absolute())), "split": "train"}
    if kind != "parquet":
        _check_encoding(path)
    if kind == "csv":
        options |= _csv_options(path)
    return kind, options


def _csv_options(path: Path) -> dict[str, Any]:
    """Return options that read each column of a CSV file as text, and an empty field as ""."""
    from datasets import Features, Value

    with _opened(path) as file:
        header = next(csv.reader(line.decode("utf-8-sig") for line in file), [])
    return {"features": Features({name: Value("string") for name in header}), "na_filter": False}


def _check_encoding(path: Path) -> None:
    """Raise ValueError with the first line of a text file that isn't UTF-8."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                is_text = "\0" not in line.decode()  # UTF-16 has zero bytes
            except UnicodeDecodeError:
                is_text = False
            if not is_text:
                raise ValueError(
                    f"line {number} isn't UTF-8 (perhaps UTF-16 or Latin-1): save it as UTF-8"
                )


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    return path.open("rb")


def normalized(records: Iterable[Mapping[str, Any]], *, source: str) -> Dataset:
    """Return `records` as `read_records` would from a file that messages call `source`."""
    from datasets import Dataset

    lines = [json.dumps(record) for record in records]
    return _records(Dataset.from_dict({"text": lines}), {}, source, None, is_json=True)


def _records(
    rows: Dataset, fields: Mapping[str, str], source: str, limit: int | None, *, is_json: bool
) -> Dataset:
    """Return the records of what `datasets` loaded: tables of fields, or lines of JSON."""
    from datasets import Features, List, Value

    is_list = is_json and "".join(rows[:BATCH]["text"]).lstrip(BLANK).startswith("[")
    kind = "list" if is_list else "lines" if is_json else "table"
    if limit is not None and not is_list:
        rows = rows.select(range(_rows_of(rows, limit, is_json)))
    size = len(rows) if is_list else BATCH
    first = next(RecordReader(source, kind, {}).numbered(rows[:size], range(size)), None)
    if first is None:
        raise ValueError(f"{source} holds no records")
    where, record = first
    reader = RecordReader(source, kind, field_names(record, fields, where))
    features: dict[str, Any] = dict.fromkeys(TEXTS, Value("string"))
    if "messages" in reader.names:
        features["turns"] = List({"role": Value("string"), "content": Value("string")})
    records = mapped(rows, reader, vars(reader), Features(features), batch_size=size, desc="read")
    named = [name if name == what else f"{name} as {what}" for what, name in reader.names.items()]
    records.info.description = f"{source} (fields {', '.join(named)})"
    return records if limit is None else records.select(range(min(limit, len(records))))


def _rows_of(rows: Dataset, limit: int, is_json: bool) -> int:
    """Return the number of rows that hold the first `limit` records; blank lines hold none."""
    if not is_json:
        return min(limit, len(rows))
    found = 0
    for number, line in enumerate(rows["text"], 1):
        found += bool(line.strip(BLANK))
        if found == limit:
            return number
    return len(rows)


def mapped(
    rows: Dataset,
    function: Callable[..., Any],
    key: object,
    features: Features,
    *,
    batch_size: int,
    desc: str,
) -> Dataset:
    """Return `rows.map` of batches and their indices, in several processes if that pays.

    The result is cached on disk by the rows, `key`, and the code that makes it. `datasets` itself
    wouldn't see that the code of an installed package changed, and takes a tokenizer that was only
    used for a changed one.
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
    """Yield batches of the columns `names`: dicts, or tables of pyarrow in the format "arrow"."""
    yield from rows.select_columns(list(names)).with_format(format).iter(BATCH)


def with_column(rows: Dataset, name: str, values: Iterable[Any]) -> Dataset:
    """Return `rows` with one more column."""
    untyped: Any = rows  # a decorator of `datasets` fills an argument that its signature requires
    return untyped.add_column(name, values)


# ---------------------------------------------------------------- training, validation, test


def load_records(args: Arguments) -> tuple[Dataset, Dataset, Dataset]:
    """Return the (training, validation, test) records that a run's arguments name.

    Raises:
        ValueError: see `read_records` and `hold_out`.
    """
    fields: dict[str, str] = {}
    for what in FIELDS:
        name = getattr(args, f"{what}_field")
        if name is not None:
            fields[what] = name
    config, source = args.dataset_config_name, args.dataset_name or args.train_file
    assert source is not None  # the arguments' own check
    records = read_records(source, fields, config=config, limit=args.max_train_samples)
    records = with_column(records, "number", range(len(records)))
    if args.validation_file is None:
        records, validation = hold_out(records, args.validation_samples, args.seed)
    else:
        validation = read_records(args.validation_file, fields, config=config)
    test = validation
    if args.test_file is not None:
        test = read_records(args.test_file, fields, config=config)
    if args.test_samples is not None:
        test = test.select(range(min(len(test), args.test_samples)))
    return records, validation, test


def hold_out(records: Dataset, number: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """Return (training, validation) records.

    Args:
        records: with their "number", from 0.
        number: how many different records are held out; by default a tenth of them, 128 at most.

    Raises:
        ValueError: fewer different training records would be left than are held out.
    """
    first = _first_copies(records)
    different = sorted(set(first))
    held_out = number or max(1, min(_MOST_HELD_OUT, len(different) // 10))
    left = len(different) - held_out
    if left < held_out:
        copies = f", {len(different)} of them different" if len(different) < len(records) else ""
        remedy = "lower validation_samples, or " if len(different) > 1 else ""
        raise ValueError(
            f"training records: {len(records)}{copies}. {held_out} can't be spared for validation, "
            f"since that leaves {max(left, 0)}: {remedy}give a validation_file"
        )
    once = records if len(different) == len(records) else records.select(different)
    parts = once.train_test_split(test_size=held_out, seed=seed)
    if once is records:
        return parts["train"], parts["test"]
    held = set(parts["test"]["number"][:])
    copies = [i for i, copied in enumerate(first) if i != copied and copied not in held]
    training = records.select([*parts["train"]["number"][:], *copies])
    dropped = len(records) - len(training) - held_out
    if dropped:
        logger.warning(
            "training data: copies of held-out records are left out: %d (%d of %d differ)",
            dropped,
            len(different),
            len(records),
        )
    return training, parts["test"]


def _first_copies(records: Dataset) -> list[int]:
    """Return, for each record, the number of the first one with the same prompt and answer."""
    names = [name for name in _TRAINED_ON if name in records.column_names]
    seen: dict[bytes, int] = {}
    first: list[int] = []
    for batch in column_batches(records, names):
        for values in zip(*batch.values(), strict=True):
            digest = sha256(repr(values).encode()).digest()
            first.append(seen.setdefault(digest, len(first)))
    return first
