"""The results file: JSON Lines, one record a line, in which a run that was stopped leaves nothing half written.

What many records share, such as the commit or the regime, stands once before them: the fields of a line
{"made_with": {…}} hold for the records below until another such line changes them; null takes a field away.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

MADE_WITH = "made_with"
SHARED = ("command", "commit", "main", "versions", "hardware", "stage", "regime", "targets", "rank", "steps")
"""The fields of a record that lines `MADE_WITH` hold."""


def read(path: Path) -> list[dict[str, Any]]:
    """The records of `path`, none if it doesn't exist. A last line without an end isn't one.

    Raises:
        ValueError: another line isn't a JSON object.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    records: list[dict[str, Any]] = []
    shared: dict[str, Any] = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON ({error}): take the line out, and start again."
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is {line!r}, expected a JSON object: take the line out.")
        if MADE_WITH in record:
            shared = _changed(shared, record[MADE_WITH])
        else:
            records.append(shared | record)
    return records


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds `records` by one write, and returns once they are on the disk. Several processes may add to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = _lines(records, _whole_lines(file))
        file.write("".join(lines).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _lines(records: Sequence[Mapping[str, Any]], before: bytes) -> list[str]:
    """The lines of `records` in a file that holds `before`."""
    lines = []
    shared = _last_shared(before)
    for record in records:
        fields = {name: value for name, value in record.items() if name not in SHARED or value is None}
        changes = {name: record.get(name) for name in SHARED if record.get(name) != shared.get(name)}
        if changes:
            lines.append(_line({MADE_WITH: changes}))
            shared = _changed(shared, changes)
        lines.append(_line(fields))
    return lines


def _last_shared(content: bytes) -> dict[str, Any]:
    """What the lines `MADE_WITH` say at the end."""
    shared: dict[str, Any] = {}
    for line in content.splitlines():
        if MADE_WITH.encode() in line and MADE_WITH in (fields := json.loads(line)):
            shared = _changed(shared, fields[MADE_WITH])
    return shared


def _changed(shared: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**shared, **changes}.items() if value is not None}


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, allow_nan=False, separators=(",", ":")) + "\n"


def _whole_lines(file: Any) -> bytes:
    """What `file` holds up to its last line end, less which it is cut; it stands at its end then."""
    file.seek(0)
    content = file.read()
    complete = content[: content.rfind(b"\n") + 1]
    file.truncate(len(complete))
    file.seek(0, os.SEEK_END)
    return complete


def now() -> str:
    """The date in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
