"""Which runs of the plan are left, with which rates, and making them: each is a line of the results file.

An arm is confirmed with the rates of the trial whose mean score over the development seeds is the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from quality import results
from quality.jobs import Settings
from quality.regimes.plan import CONFIRM_SEEDS, DEV, RATES_OF, Planned
from quality.regimes.runs import REGIMES, Cell, Run, record_of
from quality.running import Untuned

Record = Mapping[str, Any]


def runs_of(
    stage: str,
    planned: Sequence[Planned],
    records: Sequence[Record],
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """The runs of a stage that `records` lack; confirmation runs go seed after seed, so that a stop leaves whole seeds.

    Args:
        arms: of the cells; None for all.
        seeds: None for the stage's.

    Raises:
        Untuned: an arm whose development isn't complete.
        ValueError: a regime whose code has gone; the commit in its records has it.
    """
    for each in planned:
        if each.cell.regime not in REGIMES:
            raise ValueError(f"{each.cell.regime} isn't run any more: its records name the commit that has its code.")
    pairs = [(p, arm) for p in planned for arm in p.arms if arms is None or arm in arms]
    if stage == DEV:
        trials = [(p, arm, trial) for p, arm in pairs if arm not in RATES_OF for trial in p.trials(arm)]
        runs = [Run(p.cell, arm, seed, trial) for p, arm, trial in trials for seed in seeds or p.dev_seeds]
    else:
        rated = [(p.cell, arm, chosen_rates(records, p, arm)) for p, arm in pairs]
        runs = [Run(cell, arm, seed, rates) for seed in seeds or CONFIRM_SEEDS for cell, arm, rates in rated]
    done = {key_of(record) for record in records}
    return [run for run in runs if key_of(run.named) not in done]


def make(runs: Sequence[Run], stage: str, path: Path) -> None:
    """Makes `runs` one after another; each is on the disk before the next begins."""
    with tqdm(runs, desc=stage, unit="run") as bar:
        for run in bar:
            bar.set_description(f"{run.cell.regime} {run.cell.targets} r{run.cell.rank} {run.arm} {run.seed}")
            results.append(path, [record_of(run, stage)])


def chosen_rates(records: Iterable[Record], planned: Planned, arm: str) -> Settings:
    """The rates that `arm` is confirmed with.

    Raises:
        Untuned: a trial hasn't run on a development seed of the cell, or all diverged.
    """
    arm = RATES_OF.get(arm, arm)
    if not planned.trials(arm):
        return {}
    title = f"{arm} in {planned.name} of {planned.cell}"
    found = {key_of(record): record for record in records if record["stage"] == DEV}
    means = []
    for trial in planned.trials(arm):
        keys = [key_of(Run(planned.cell, arm, seed, trial).named) for seed in planned.dev_seeds]
        if missing := [key for key in keys if key not in found]:
            raise Untuned(f"{title} lacks {len(missing)} development runs: run --stages dev first.")
        scores = [found[key]["score"] for key in keys]
        means.append(math.inf if None in scores else fmean(scores))
    if math.isinf(min(means)):
        raise Untuned(f"every trial of {title} diverged: give it lower rates.")
    return planned.trials(arm)[means.index(min(means))]


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(record["regime"], record["targets"], record["rank"], record["steps"])


def place_of(record: Record) -> tuple[Any, ...]:
    """The cell, arm and seed of a record."""
    return tuple(record[name] for name in ("regime", "targets", "rank", "steps", "arm", "seed"))


def key_of(record: Record) -> tuple[Any, ...]:
    """What tells a record, or a run to be made, from others: its place and its rates."""
    return (*place_of(record), *sorted(record["rates"].items()))
