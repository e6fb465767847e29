"""Where, with what and how often the runs of a file were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quality.jobs import SEEDS
from quality.report.data import Record, distinct, select
from quality.report.markdown import listed


def setting(records: Sequence[Record]) -> str:
    """As a list."""
    main = select(records, stage="main")
    lines = [_seeds(select(main, backbone=backbone)) for backbone in distinct(main, "backbone")]
    for name, title in (("hardware", "Hardware"), ("versions", "Versions"), ("commit", "Commits")):
        values = list(dict.fromkeys(_plain(record[name]) for record in records if record.get(name)))
        lines += [f"* {title}: {'; '.join(values)}."] if values else []
    return "\n".join([*lines, f"* All runs together took {hours(records):.1f} hours of one core."])


def hours(records: Sequence[Record]) -> float:
    """Of all runs: a run's last record, which may be that of a control, has its time."""
    return sum(record.get("seconds") or 0.0 for record in records if record.get("last", True)) / 3600


def _seeds(records: Sequence[Record]) -> str:
    seeds = sorted(set(distinct(records, "seed")))
    usual, further = [s for s in seeds if s in SEEDS], [s for s in seeds if s not in SEEDS]
    more = f", {len(further)} more of some methods ({listed(further)})" if further else ""
    domains = listed(distinct(records, "domain"))
    return f"* {records[0]['backbone']}: {domains}; {len(usual)} seeds ({listed(usual)}){more}; {len(records)} records."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, text in value.items() if text is not None)
    return str(value)
