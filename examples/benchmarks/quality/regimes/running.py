"""Which runs of the plan are left, and making them: each is a line of the results file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from quality import results
from quality.regimes.plan import CONFIRM, CONFIRM_SEEDS, Planned
from quality.regimes.runs import REGIMES, Cell, Run, record_of
from quality.running import RESULTS, Settings

Record = Mapping[str, Any]


def runs_of(
    planned: Sequence[Planned],
    records: Sequence[Record],
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """The runs that `records` lack, seed after seed, so that a stop leaves whole seeds.

    Args:
        arms: of the cells; None for all.
        seeds: None for the plan's.

    Raises:
        ValueError: a regime whose code has gone; the commit in its records has it.
    """
    for each in planned:
        if each.cell.regime not in REGIMES or each.label:
            raise ValueError(f"{each.name} isn't run any more: its records name the commit that has its code.")
    rated = [(p.cell, arm, rates_of(p.cell, arm)) for p in planned for arm in p.arms if arms is None or arm in arms]
    runs = [Run(cell, arm, seed, rates) for seed in seeds or CONFIRM_SEEDS for cell, arm, rates in rated]
    done = {key_of(record) for record in records}
    return [run for run in runs if key_of(run.named) not in done]


def make(runs: Sequence[Run], path: Path) -> None:
    """Makes `runs` one after another; each is on the disk before the next begins."""
    with tqdm(runs, unit="run") as bar:
        for run in bar:
            bar.set_description(f"{run.cell.regime} {run.cell.targets} r{run.cell.rank} {run.arm} {run.seed}")
            results.append(path, [record_of(run, CONFIRM)])


def rates_of(cell: Cell, arm: str) -> Settings:
    """The rates with which the arm was confirmed: those of the trial with the lowest mean score on other seeds."""
    records = results.read(RESULTS / "regimes.jsonl")
    return next(r["rates"] for r in records if r["stage"] == CONFIRM and cell_of(r) == cell and r["arm"] == arm)


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(record["regime"], record["targets"], record["rank"], record["steps"])


def place_of(record: Record) -> tuple[Any, ...]:
    """The cell, arm and seed of a record."""
    return tuple(record[name] for name in ("regime", "targets", "rank", "steps", "arm", "seed"))


def key_of(record: Record) -> tuple[Any, ...]:
    """What tells a record, or a run to be made, from others: its place and its rates."""
    return (*place_of(record), *sorted(record["rates"].items()))
