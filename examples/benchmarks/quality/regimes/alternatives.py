"""The alternatives to NaRA, as arms: what results/alternatives_plan.md fixed before fresh seeds ran.

Every arm tried equally many rates on a development seed; the best, by its score there, was confirmed on fresh seeds.
A difference is taken within a seed, whose arms meet the same data and noise; ± is half of a 95 % interval of Student's
t over the seeds. Of what isn't trained there is one figure for all seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from quality.regimes.plan import CONFIRM, Rated, Record, cell_of, key_of, rates_of
from quality.regimes.report import DIGITS, Confirmed
from quality.regimes.runs import Cell
from quality.report.data import NOTHING, change, rounded_mean, spread, table
from quality.results import read
from quality.running import RESULTS

DEV, DEV_SEED = "dev", 100
SEEDS = tuple(range(300, 310))
RECORDS = RESULTS / "alternatives.jsonl"
FIRST = "as in the first plan"

# ---------------------------------------------------------------------- arms

Rates = Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """Attributes:
    cell, arm: as regimes train them.
    grid: the rates that are tried; none of an arm that keeps those of the first plan.
    """

    cell: Cell
    arm: str
    grid: Sequence[Rates] = ()


@dataclass(frozen=True)
class Group:
    """What is registered and confirmed together.

    Attributes:
        name, about: of the plan's table.
        regime: whose held-out set is the measure.
        arms: what is trained, by its title in tables.
        pairs: of titles; the differences that are looked at, the first less the second.
        front: those of them that the first table of examples/benchmarks/results/alternatives.md shows.
    """

    name: str
    about: str
    regime: str
    arms: Mapping[str, Arm]
    pairs: Sequence[tuple[str, str]]
    front: Sequence[tuple[str, str]] = ()


def _groups() -> tuple[Group, ...]:
    planned = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    grids: dict[str | None, Sequence[Rates]] = {
        name: [dict(zip(("learning_rate", "core_learning_rate"), values, strict=False)) for values in product(*grid)]
        for name, grid in planned["grids"].items()
    }

    def arm(fields: Sequence[Any]) -> Arm:
        *cell, trained, grid = fields if len(fields) == 6 else (*fields, None)
        return Arm(Cell(*cell), trained, grids.get(grid, ()))

    def group(name: str, fields: Mapping[str, Any]) -> Group:
        arms = {title: arm(values) for title, values in fields["arms"].items()}
        pairs = {
            key: [(a, b) for a, partners in fields.get(key, {}).items() for b in partners] for key in ("pairs", "front")
        }
        return Group(name, fields["about"], fields["regime"], arms, **pairs)

    return tuple(group(name, fields) for name, fields in planned["groups"].items())


GROUPS = _groups()


# ---------------------------------------------------------------------- rates


def development(folder: Path = RESULTS) -> list[Record]:
    """The records, those of the first plan too."""
    return [*read(folder / "regimes.jsonl"), *read(folder / RECORDS.name)]


def trials(arm: Arm, records: Sequence[Record]) -> list[tuple[Rates, float]]:
    """(rates, score) of those that were made, the lowest rate first; infinity of training that diverged."""
    of_arm = [r for r in records if r["stage"] == DEV and r["seed"] == DEV_SEED and r["arm"] == arm.arm]
    by_key = {key_of(r): r for r in of_arm if cell_of(r) == arm.cell}
    scored = [(r["rates"], float("inf") if r["score"] is None else r["score"]) for r in by_key.values()]
    return sorted(scored, key=lambda trial: tuple(trial[0].values()))


def registered_rates(arm: Arm, records: Sequence[Record]) -> Rates:
    """Those of the trial with the lowest score."""
    return min(trials(arm, records), key=lambda trial: trial[1])[0] if arm.grid else rates_of(arm.cell, arm.arm)


def rated(groups: Sequence[Group]) -> list[Rated]:
    """What is trained in them, with its registered rates."""
    trial_records = development()
    return [
        (arm.cell, arm.arm, registered_rates(arm, trial_records)) for group in groups for arm in group.arms.values()
    ]


def described(rates: Rates) -> str:
    return " / ".join(f"{value:g}" for value in rates.values())


def rates_table(records: Sequence[Record]) -> str:
    """A row an arm: what was tried on the development seed, and what was chosen."""
    rows = []
    for group in GROUPS:
        for title, arm in group.arms.items():
            tried = "; ".join(f"{described(rates)}: {score:.4f}" for rates, score in trials(arm, records))
            rows.append([group.name, title, tried if arm.grid else FIRST, described(registered_rates(arm, records))])
    return table(["group", "method", "trials (rate, or rate / core's rate: score)", "chosen"], rows)


# ---------------------------------------------------------------------- what fresh seeds say


def confirmed(group: Group, records: Sequence[Record]) -> Confirmed:
    """What `records` say of a group, under the titles of its arms, and of what isn't trained."""
    by_run: dict[tuple[str, int], Record] = {}
    for title, arm in group.arms.items():
        of_arm = [r for r in records if r["stage"] == CONFIRM and r["arm"] == arm.arm and cell_of(r) == arm.cell]
        by_run |= {(title, record["seed"]): record for record in of_arm}
    for record in records:
        if record["seed"] is None and record["regime"] == group.regime:
            by_run |= {(record["arm"], seed): record for seed in SEEDS}
    return Confirmed(group, by_run, SEEDS)


def _size(cell: Confirmed, title: str) -> str:
    """Trained parameters, and how many of them aren't a core's."""
    record = cell.records[title, SEEDS[0]]
    every, core = record.get("trainable_parameters", 0), record.get("core_parameters")
    return f"{every} ({every - core})" if core else str(every)


def report(records: Sequence[Record]) -> str:
    """A section a group: its arms, and the differences that the plan names."""
    return "\n\n".join(_section(confirmed(group, records)) for group in GROUPS)


def _section(cell: Confirmed) -> str:
    title = f"### {cell.planned.name}: {cell.planned.about}"
    if not cell.is_whole:
        return f"{title}\n\nOpen: {cell.done} of {cell.due} runs are there."
    rows = [_row(cell, title) for title in dict.fromkeys(title for title, _ in cell.records)]
    pairs = [[one, other, change(cell.difference(one, other), DIGITS)] for one, other in cell.planned.pairs]
    scores = table(["method", "parameters (without the core)", "rate", "score ± deviation"], rows)
    return "\n\n".join([title, scores, table(["method", "less", "difference"], pairs)])


def _row(cell: Confirmed, title: str) -> list[str]:
    if title not in cell.planned.arms:
        return [title, "0", NOTHING, rounded_mean(cell.score(title), DIGITS)]
    rates = described(cell.records[title, SEEDS[0]]["rates"])
    return [title, _size(cell, title), rates, spread(cell.score(title), DIGITS)]


def front(records: Sequence[Record]) -> str:
    """A form of NaRA a row, and what stands against it."""
    rows = []
    for cell in (confirmed(group, records) for group in GROUPS):
        for pair in cell.planned.front if cell.is_whole else ():
            of_each = [text for name in pair for text in (name, _size(cell, name), rounded_mean(cell.score(name)))]
            rows.append([cell.planned.name, *of_each, change(cell.difference(*pair), DIGITS)])
    header = ["regime", "a form of NaRA", "parameters", "loss", "an alternative", "parameters", "loss", "difference"]
    return table(header, rows)
