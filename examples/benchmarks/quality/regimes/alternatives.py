"""The alternatives to NaRA, as arms: what docs/results/alternatives_plan.md fixes before fresh seeds run.

Every arm tries equally many rates on a development seed; the best, by its score there, is confirmed on ten fresh seeds.
Where the best rate of an arm without a core is the first or last that was tried, the next one outward is tried too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from quality import results
from quality.regimes.plan import CONFIRM, Record, cell_of, key_of, rates_of
from quality.regimes.runs import Cell, Run
from quality.running import RESULTS

DEV, DEV_SEED = "dev", 100
SEEDS = tuple(range(300, 310))
PAGE = "docs/results/alternatives_plan.md"
RECORDS = RESULTS / "alternatives.jsonl"

# ---------------------------------------------------------------------- arms

Rates = Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """Attributes:
    title: in tables, unique in its group.
    cell, arm: as regimes train them.
    grid: the rates that are tried; none of an arm that keeps those of the first plan.
    """

    title: str
    cell: Cell
    arm: str
    grid: Sequence[Rates] = ()


@dataclass(frozen=True)
class Group:
    """What is registered and confirmed together.

    Attributes:
        name, about: of the plan's table.
        regime: whose held-out set is the measure.
        arms: what is trained.
        pairs: of titles; the differences that are looked at, the first less the second.
        front: those of them that the front page shows.
    """

    name: str
    about: str
    regime: str
    arms: Sequence[Arm]
    pairs: Sequence[tuple[str, str]]
    front: Sequence[tuple[str, str]] = ()


def _groups() -> tuple[Group, ...]:
    planned = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    grids: dict[str | None, Sequence[Rates]] = {
        name: [dict(zip(("learning_rate", "core_learning_rate"), each, strict=False)) for each in product(*grid)]
        for name, grid in planned["grids"].items()
    }

    def arm(title: str, fields: Sequence[Any]) -> Arm:
        *cell, trained, grid = fields if len(fields) == 6 else (*fields, None)
        return Arm(title, Cell(*cell), trained, grids.get(grid, ()))

    def group(name: str, fields: Mapping[str, Any]) -> Group:
        arms = [arm(title, each) for title, each in fields["arms"].items()]
        pairs = {
            key: [(a, b) for a, others in fields.get(key, {}).items() for b in others] for key in ("pairs", "front")
        }
        return Group(name, fields["about"], fields["regime"], arms, **pairs)

    return tuple(group(name, fields) for name, fields in planned["groups"].items())


GROUPS = _groups()


# ---------------------------------------------------------------------- rates

Trials = list[tuple[Rates, float]]
"""(rates, score), a score of infinity of training that diverged."""


def trials(arm: Arm, records: Sequence[Record]) -> Trials:
    """Those that were made, the lowest rate first."""
    own = [r for r in records if r["stage"] == DEV and r["seed"] == DEV_SEED and r["arm"] == arm.arm]
    found = {key_of(r): r for r in own if cell_of(r) == arm.cell}
    made = [(r["rates"], float("inf") if r["score"] is None else r["score"]) for r in found.values()]
    return sorted(made, key=lambda trial: tuple(trial[0].values()))


def untried(arm: Arm, records: Sequence[Record]) -> list[Rates]:
    """What is to be tried next: the rest of the grid; then one outward of a best rate at an end, without a core."""
    made = trials(arm, records)
    known = [rates for rates, _ in made]
    if left := [rates for rates in arm.grid if rates not in known]:
        return left
    if not arm.grid or len(arm.grid[0]) > 1:
        return []
    best = min(range(len(made)), key=lambda index: made[index][1])
    if 0 < best < len(made) - 1:
        return []
    return [{"learning_rate": known[best]["learning_rate"] * (2 if best else 0.5)}]


def registered_rates(arm: Arm, records: Sequence[Record]) -> Rates:
    """Those of the trial with the lowest score.

    Raises:
        ValueError: trials are missing.
    """
    if not arm.grid:
        return rates_of(arm.cell, arm.arm)
    if left := untried(arm, records):
        raise ValueError(f"{arm.title} of {arm.cell.regime}: no trial yet of {left}; run --stage dev first.")
    return min(trials(arm, records), key=lambda trial: trial[1])[0]


# ---------------------------------------------------------------------- runs


def development(folder: Path = RESULTS) -> list[Record]:
    """The records, those of the first plan too."""
    return [*results.read(folder / "regimes.jsonl"), *results.read(folder / RECORDS.name)]


def registered() -> list[str]:
    """The groups that the committed plan names."""
    shown = subprocess.run(["git", "show", f"HEAD:{PAGE}"], capture_output=True, text=True, check=True, cwd=RESULTS)
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith("Registered: "))
    return line.removeprefix("Registered: ").partition(" (")[0].split(", ")


def next_run(groups: Sequence[Group], stage: str, seeds: Sequence[int] = SEEDS) -> Run | None:
    """The first that is missing: group after group, and in a group seed after seed.

    Raises:
        ValueError: a group that the committed plan doesn't register.
    """
    known = development()
    if stage == DEV:
        arms = [arm for group in groups for arm in group.arms]
        return next((Run(arm.cell, arm.arm, DEV_SEED, rates) for arm in arms for rates in untried(arm, known)), None)
    if missing := [group.name for group in groups if group.name not in registered()]:
        raise ValueError(f"{', '.join(missing)}: not registered in the committed {PAGE}.")
    done = {key_of(record) for record in known if record["stage"] == CONFIRM}
    for group in groups:
        rated = [(arm, registered_rates(arm, known)) for arm in group.arms]
        for seed in seeds:
            for arm, rates in rated:
                run = Run(arm.cell, arm.arm, seed, rates)
                if key_of(run.named) not in done:
                    return run
    return None


def described(rates: Rates) -> str:
    return " / ".join(f"{value:g}" for value in rates.values())


def make_runs(groups: Sequence[Group], stage: str, seeds: Sequence[int], make: Any) -> None:
    """Makes the missing runs one after another; each is on the disk before the next begins."""
    while run := next_run(groups, stage, seeds):
        record = make(run, stage)
        results.append(RECORDS, [record])
        named = " ".join(map(str, (stage, *astuple(run.cell), run.arm, run.seed, described(run.rates))))
        print(f"{record['date']} {named}: {record['score']} in {record['core_seconds']} s", flush=True)
