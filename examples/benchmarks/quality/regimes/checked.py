"""The table of what nara_check said of the regimes, beside what their confirmed runs say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from check.trials import TITLES, WAYS
from check.verdict import LIKELY, UNLIKELY

from quality.regimes.plan import PLAN
from quality.regimes.report import Confirmed, confirmed
from quality.regimes.runs import REGIMES, Cell
from quality.report.data import NOTHING, below_zero, table

ROWS = {
    name: Cell(name.partition(":")[0], "all" if ":" in name else "attention", 4, 200)
    for name in (*REGIMES, "eps_to_v:all")
}
"""{name: what was checked}, in the table's order."""

Record = Mapping[str, Any]
RIGHT, WRONG, OPEN = "right", "**wrong**", "–"
ALONE = {"subject": False}
"""{row: whether λ pays}, of what RESULTS.md answers and not a regime of the plan."""


def check_table(records: Sequence[Record], known: Sequence[Record]) -> str:
    """A line a record, in the order of `ROWS`."""
    order = list(ROWS)
    rows = [_row(record, known) for record in sorted(records, key=lambda r: (order.index(r["row"]), r["seed"]))]
    header = ["regime, seed", "known", "NaRA − LoRA", "NaRA − NaRA without λ", "NaRA − cheap way", "cheap way − LoRA"]
    return table([*header, "repeats", "verdict", "is it?"], rows)


def _row(record: Record, known: Sequence[Record]) -> list[str]:
    cell, by_arm = _confirmed(record["row"], known), record["differences"]
    cheap = next((way for way in WAYS if way in by_arm), None)
    pairs = [("nara", "lora"), ("nara", "untold"), ("nara", cheap), (cheap, "lora")]
    differences = [_described(by_arm[arm][other]) if arm and other else NOTHING for arm, other in pairs]
    named = [f"{record['row']}, {record['seed']}", _known(record["row"], cell), *differences, str(record["repeats"])]
    verdict, way = record["verdict"], record["way"]
    judged = _judged(verdict, _pays(record["row"], cell))
    return [*named, f"{verdict}: {TITLES[way]}" if way else verdict, judged]


def _judged(verdict: str, pays: bool | None) -> str:
    if pays is None or verdict not in (LIKELY, UNLIKELY):
        return OPEN
    return RIGHT if (verdict == LIKELY) == pays else WRONG


def _confirmed(row: str, known: Sequence[Record]) -> Confirmed | None:
    """The confirmation of the row's cell, if all its runs are there."""
    cells = [confirmed(planned, known) for planned in PLAN if planned.cell == ROWS[row]]
    return cells[0] if cells and cells[0].is_whole else None


def _pays(row: str, cell: Confirmed | None) -> bool | None:
    """Whether NaRA is below LoRA and below itself without λ, both clear of zero; None where runs say nothing."""
    if cell is None:
        return ALONE.get(row)
    intervals = [cell.difference("nara", other) for other in ("lora", "nara_constant") if other in cell.planned.arms]
    return (
        None
        if None in intervals
        else all(one_interval is not None and below_zero(one_interval) for one_interval in intervals)
    )


def _known(row: str, cell: Confirmed | None) -> str:
    """The relative difference of NaRA's and LoRA's mean scores."""
    if cell is None:
        return "no gain" if ALONE.get(row) is False else "open"
    if _pays(row, cell) is None:
        return "no interval"
    nara, lora = (fmean(r["score"] for (name, _), r in cell.records.items() if name == arm) for arm in ("nara", "lora"))
    return f"{_percent(nara / lora - 1)}, {'pays' if _pays(row, cell) else 'no gain from λ'}"


def _described(difference: Mapping[str, float]) -> str:
    return f"{_percent(difference['mean'])} ({_percent(difference['low'])} to {_percent(difference['high'])})"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")
