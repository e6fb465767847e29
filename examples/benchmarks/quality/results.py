"""The results file: JSON Lines, one record a line, in which a run that was stopped leaves nothing half written."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmark_record import commit, processor, versions


def read(path: Path) -> list[dict[str, Any]]:
    """The records of `path`, none if it doesn't exist. A last line without an end isn't one.

    Raises:
        ValueError: another line isn't a JSON object.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    records = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON ({error}): take the line out, and start again."
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is {line!r}, expected a JSON object: take the line out.")
        records.append(record)
    return records


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds `records` by one write, and returns once they are on the disk. Several processes may add to one file."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _drop_unfinished_line(file)
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _drop_unfinished_line(file: Any) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


@cache
def provenance() -> dict[str, Any]:
    """What is needed to repeat a run: commit, versions, hardware."""
    hardware = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"commit": commit(), "versions": versions(), "hardware": hardware}


def now() -> str:
    """The date in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
