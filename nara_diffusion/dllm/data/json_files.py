"""Reading of JSON lists of objects and of JSON Lines, plain or gzipped.

Fractions stay as the file writes them ("1.50" isn't "1.5"), and so do integers too long for Python to convert. Each
error names the file, and the line or the record.
"""

from __future__ import annotations

import gzip
import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

_LONG = 4300  # digits; Python's own limit
_GZIP = b"\x1f\x8b"  # what every gzip file begins with, whatever its name


class _FieldTwice:
    """An object in which a field stands twice: JSON doesn't say which of the two counts."""

    def __init__(self, name: str) -> None:
        self.name = name


def read_json_objects(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file that is a JSON list or JSON Lines.

    Raises:
        ValueError: no such file, one that can't be read, an empty one, no UTF-8, JSON that breaks (with the line), a
            record that is no object or has a field twice (with its number).
    """
    text = _text(path)
    numbered = _of_list(text, path) if text.lstrip().startswith("[") else _of_lines(text, path)
    for where, row in numbered:
        if isinstance(row, _FieldTwice):
            raise ValueError(f"{path}, {where}: the field {row.name!r} stands twice: keep one of the two")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {where}: expected an object, found {json.dumps(row, default=str)[:60]}")
    return [row for _, row in numbered]


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: pass a JSON or JSON Lines file of {{instruction, output, answer}}")
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text (byte {error.start}: {error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty: it has to hold one record at least")
    return text


def _of_list(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        rows = _parsed(text, path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} breaks at line {error.lineno}, column {error.colno}: {error.msg}") from None
    return [(f"record {n}", row) for n, row in enumerate(rows, 1)]


def _of_lines(text: str, path: Path) -> list[tuple[str, Any]]:
    """Read JSON Lines. Only a line feed ends a line: JSON's texts may hold the other line separators."""
    lines = enumerate(text.split("\n"), 1)
    return [(f"line {number}", _parsed_line(line, number, path)) for number, line in lines if line.strip()]


def _parsed_line(line: str, number: int, path: Path) -> Any:
    try:
        return _parsed(line, f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} breaks at line {number}, column {error.colno}: {error.msg}. Each line has to hold one whole "
            "object; a list over several lines has to start with ["
        ) from None


def _parsed(text: str, where: object) -> Any:
    try:
        return _loads(text)
    except RecursionError:
        raise ValueError(f"{where} nests too deeply to be read: expected objects whose fields are texts") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _FieldTwice:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            return _FieldTwice(name)
        fields[name] = value
    return fields


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) < _LONG else digits


_loads = partial(json.loads, object_pairs_hook=_object, parse_int=_integer, parse_float=str, parse_constant=float)
