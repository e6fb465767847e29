"""Which rates an arm is confirmed with: those of the trial with the lowest mean score over its development seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from quality.regimes.plan import DEV, RATES_OF, Planned
from quality.regimes.runs import Cell, Run
from quality.suites import Settings
from quality.tuning import Untuned

Record = Mapping[str, Any]


def trial_runs(planned: Planned, arm: str, seeds: Sequence[int] | None = None) -> list[Run]:
    """Every trial of `arm`, on each development seed of the cell, or of `seeds`."""
    seeds = planned.dev_seeds if seeds is None else seeds
    return [Run(planned.cell, arm, seed, trial) for seed in seeds for trial in planned.trials(arm)]


def trial_scores(records: Iterable[Record], planned: Planned, arm: str) -> list[list[float | None]]:
    """(trials, development seeds): the score of each, infinite where it diverged, None where it hasn't run."""
    found = {key_of(record): record for record in records if record["stage"] == DEV}
    runs = [[Run(planned.cell, arm, seed, trial) for seed in planned.dev_seeds] for trial in planned.trials(arm)]
    return [[_score(found.get(key_of(run.named))) for run in trial] for trial in runs]


def chosen_rates(records: Sequence[Record], planned: Planned, arm: str) -> Settings:
    """The rates that `arm` is confirmed with.

    Raises:
        Untuned: a trial hasn't run on a development seed of the cell, or all diverged.
    """
    arm = RATES_OF.get(arm, arm)
    if not planned.trials(arm):
        return {}
    cell = planned.cell
    title = f"{arm} in {cell.regime}, {cell.targets}, rank {cell.rank}, {cell.steps} steps"
    scores = trial_scores(records, planned, arm)
    missing = sum(score is None for trial in scores for score in trial)
    if missing:
        raise Untuned(f"{title} lacks {missing} development runs: run --stages dev first.")
    means = [fmean(score for score in trial if score is not None) for trial in scores]
    if math.isinf(min(means)):
        raise Untuned(f"every trial of {title} diverged: give it lower rates.")
    return planned.trials(arm)[means.index(min(means))]


def is_at_an_end(planned: Planned, arm: str, rates: Settings) -> bool:
    """Whether `rates`, of an arm with one rate, are the lowest or the highest of its grid: it has to be widened."""
    grid = sorted(trial["learning_rate"] for trial in planned.trials(RATES_OF.get(arm, arm)))
    return len(rates) == 1 and rates["learning_rate"] in (grid[0], grid[-1])


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(record["regime"], record["targets"], record["rank"], record["steps"])


def place_of(record: Record) -> tuple[Any, ...]:
    """The cell, arm and seed of a record."""
    return tuple(record[name] for name in ("regime", "targets", "rank", "steps", "arm", "seed"))


def key_of(record: Record) -> tuple[Any, ...]:
    """By what a record, or a run to be made, is told from others: its place and its rates."""
    return (*place_of(record), *sorted(record["rates"].items()))


def _score(record: Record | None) -> float | None:
    if record is None:
        return None
    return math.inf if record["score"] is None else record["score"]
