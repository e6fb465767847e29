"""Raw results → the numbers of the report: figures of each seed, and paired differences with their 95 % interval.

The unit is the seed: runs of one seed share data order and noise, so that the difference of two methods is taken within
a seed; the mean over domains is taken there too, and the interval (Student's t) is over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from mean_interval import Interval, interval

from quality.results import read

Record = Mapping[str, Any]
Value = Callable[[Record], float | None]

REQUIRED = ("suite", "stage", "backbone", "domain", "method", "seed", "validation_loss")
PACKED = {"form": "changes"}
"""The first line of a packed file."""
SAME_FOR_ALL_SEEDS = ("learning_rate", "core_learning_rate", "rank", "steps", "settings")


class Arm(NamedTuple):
    """What is compared: a method, or one of its controls."""

    method: str
    control: str | None = None


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All records of JSON Lines files, packed (as those in results/ are) or as benchmark_quality.py writes them.

    Raises:
        ValueError: no file, a line that isn't a JSON object, or a record that lacks what every record has.
    """
    paths = list(paths)
    if not paths:
        raise ValueError("there are no results: run examples/benchmarks/benchmark_quality.py first.")
    return [record for path in paths for record in _records(path)]


def _records(path: Path) -> list[dict[str, Any]]:
    lines = read(path)
    if is_packed := lines[:1] == [PACKED]:
        lines = _unpacked(lines[1:])
    for number, record in enumerate(lines, start=1 + is_packed):
        if missing := [name for name in REQUIRED if name not in record]:
            raise ValueError(
                f"{path}, line {number} lacks {', '.join(missing)}: "
                "expected what examples/benchmarks/benchmark_quality.py writes."
            )
    return lines


def _unpacked(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records whose lines hold the fields that differ from the line before; a field that is null isn't there."""
    state: dict[str, Any] = {}
    records = []
    for line in lines:
        state = state | dict(line)
        fields = {name: value for name, value in state.items() if value is not None or name in REQUIRED}
        records.append({"control": None, **fields})
    return records


@dataclass(frozen=True)
class Grid:
    """Records of one suite, backbone and stage, each under its arm, domain and seed.

    Attributes:
        cells: {(arm, domain, seed): record}.
    """

    cells: Mapping[tuple[Arm, str, int], Record]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Grid:
        """A run that was repeated counts once: the last.

        Raises:
            ValueError: an arm was run with different settings on one domain, so that its seeds can't be pooled.
        """
        cells: dict[tuple[Arm, str, int], Record] = {}
        for record in records:
            arm = Arm(record["method"], record.get("control"))
            cells[arm, record["domain"], record["seed"]] = record
        _check_settings(cells)
        return cls(cells)

    @property
    def arms(self) -> list[Arm]:
        """In the order of their first record."""
        return list(dict.fromkeys(arm for arm, _, _ in self.cells))

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(domain for _, domain, _ in self.cells))

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, _, seed in self.cells})

    def records(self, arm: Arm) -> list[Record]:
        return [record for (of_cell, _, _), record in self.cells.items() if of_cell == arm]

    def per_seed(self, arm: Arm, value: Value, domains: Sequence[str] | None = None) -> dict[int, float]:
        """{seed: mean over `domains`}, default all; of seeds that have the value on them all."""
        names = self.domains if domains is None else domains
        means = {}
        for seed in self.seeds:
            cells = [self.cells.get((arm, name, seed)) for name in names]
            values = [None if cell is None else value(cell) for cell in cells]
            present = [one_value for one_value in values if one_value is not None]
            if present and len(present) == len(names):
                means[seed] = fmean(present)
        return means

    def spread(self, arm: Arm, value: Value, domains: Sequence[str] | None = None) -> Interval | None:
        """Mean, deviation and interval over the seeds; None if there is no such run."""
        values = list(self.per_seed(arm, value, domains).values())
        return interval(values) if values else None

    def difference(
        self, arm: Arm, baseline: Arm, value: Value, domains: Sequence[str] | None = None
    ) -> Interval | None:
        """`arm` − `baseline`, paired over the seeds that both have; None without two of them."""
        ours, other = self.per_seed(arm, value, domains), self.per_seed(baseline, value, domains)
        differences = [ours[seed] - other[seed] for seed in ours if seed in other]
        return interval(differences) if len(differences) > 1 else None


def _check_settings(cells: Mapping[tuple[Arm, str, int], Record]) -> None:
    by_cell: dict[tuple[Arm, str], dict[str, Any]] = {}
    for (arm, domain, seed), record in cells.items():
        settings = {name: record.get(name) for name in SAME_FOR_ALL_SEEDS}
        first = by_cell.setdefault((arm, domain), settings)
        if settings != first:
            changed = {name: (first[name], settings[name]) for name in settings if settings[name] != first[name]}
            raise ValueError(
                f"{arm.method} on {domain} was run with different settings, {changed} (seed {seed}): keep the runs of "
                "one setting, or give the others another stage."
            )


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records whose fields have these values."""
    return [record for record in records if all(record.get(name) == value for name, value in wanted.items())]


def distinct(records: Iterable[Record], name: str) -> list[Any]:
    """The values of a field, in the order of their first record."""
    return list(dict.fromkeys(record.get(name) for record in records))


def clear_of_zero(found: Interval | None) -> bool:
    """Whether the interval exists and doesn't hold zero."""
    return found is not None and (found.low > 0 or found.high < 0)


def below_zero(found: Interval | None) -> bool:
    return found is not None and found.high < 0


# ---------------------------------------------------------------------- as Markdown

NOTHING = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(found: Interval | None, digits: int) -> str:
    """Mean ± standard deviation; the mean alone of a single seed."""
    if found is None:
        return NOTHING
    mean = f"{found.mean:.{digits}f}"
    return mean if math.isnan(found.std) else f"{mean} ± {found.std:.{digits}f}"


def rounded_mean(found: Interval | None, digits: int = 3) -> str:
    return NOTHING if found is None else f"{found.mean:.{digits}f}"


def difference(found: Interval | None, digits: int) -> str:
    """Mean and 95 % interval with signs; bold where the interval doesn't hold zero, and the mean shows it."""
    if found is None:
        return NOTHING
    mean, low, high = (signed(value, digits) for value in (found.mean, found.low, found.high))
    return f"{_emphasised(mean, found)} [{low}, {high}]"


def change(found: Interval | None, digits: int) -> str:
    """As `difference`, in less room: mean ± half the width of the 95 % interval."""
    if found is None:
        return NOTHING
    return f"{_emphasised(signed(found.mean, digits), found)} ± {(found.high - found.low) / 2:.{digits}f}"


def _emphasised(mean: str, found: Interval) -> str:
    return f"**{mean}**" if clear_of_zero(found) and mean.strip("+−0.") else mean


def percent(share: float) -> str:
    """In whole percents."""
    text = f"{100 * share:.0f}"
    return ("0" if text == "-0" else text.replace("-", "−")) + " %"


def signed(value: float, digits: int) -> str:
    """With a real minus, and no sign on a zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]
