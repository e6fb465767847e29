"""Makes runs one after another, each a line of the results file; those that are there aren't made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from quality import results
from quality.regimes.plan import CONFIRM, CONFIRM_SEEDS, DEV, DEV_SEEDS, RATES_OF, Planned, is_deciding
from quality.regimes.rates import Record, chosen_rates, key_of, place_of, trial_runs
from quality.regimes.runs import Run, record_of


@dataclass(frozen=True)
class Wish:
    """Attributes:
    planned: cells of the plan.
    arms: of them, None for all.
    seeds: of them, None for all of the stage.
    """

    planned: Sequence[Planned]
    arms: Sequence[str] | None = None
    seeds: Sequence[int] | None = None


def runs_of(stage: str, wish: Wish, records: Sequence[Record]) -> list[Run]:
    """The runs of a stage that are asked for, done or not.

    Development runs are those of the plan's development seeds unless seeds are named; confirmation runs go seed after
    seed, so that a stop leaves whole seeds behind.

    Raises:
        ValueError: a seed that isn't the stage's; an arm whose development isn't complete, or that was confirmed with
            other rates before.
    """
    _check_seeds(stage, wish.seeds)
    pairs = [(p, arm) for p in wish.planned for arm in p.arms if wish.arms is None or arm in wish.arms]
    if stage == DEV:
        return [run for p, arm in pairs if arm not in RATES_OF for run in trial_runs(p, arm, wish.seeds)]
    rates = [chosen_rates(records, planned, arm) for planned, arm in pairs]
    seeds = CONFIRM_SEEDS if wish.seeds is None else wish.seeds
    arms = list(zip(pairs, rates, strict=True))
    runs = [Run(planned.cell, arm, seed, own) for seed in seeds for (planned, arm), own in arms]
    _check_same_rates(runs, records)
    return runs


def _check_seeds(stage: str, seeds: Sequence[int] | None) -> None:
    own = DEV_SEEDS if stage == DEV else CONFIRM_SEEDS
    wrong = sorted(set(seeds or ()) - set(own))
    if wrong:
        raise ValueError(f"--seeds has {wrong}, but {stage} has the seeds {own[0]} to {own[-1]}.")


def _check_same_rates(runs: Iterable[Run], records: Iterable[Record]) -> None:
    """Refuses to mix runs of different rates: they would be compared as if they had one."""
    was = {place_of(r): r["rates"] for r in records if r["stage"] == CONFIRM}
    for run in runs:
        before = was.get(place_of(run.named), run.rates)
        if before != run.rates:
            raise ValueError(
                f"{run.arm} of seed {run.seed} in {run.cell} was confirmed with {before}, and development now says "
                f"{dict(run.rates)}: the plan changed after its confirmation began. Write to another --output."
            )


def left_of(runs: Iterable[Run], records: Iterable[Record]) -> list[Run]:
    """Those that no record is of."""
    done = {key_of(record) for record in records}
    return [run for run in runs if key_of(run.named) not in done]


def make(
    runs: Sequence[Run],
    stage: str,
    path: Path,
    budget_hours: float,
    record: Callable[[Run, str, bool], dict[str, Any]] = record_of,
) -> int:
    """Makes `runs` until all are done, or the records of `path` have taken `budget_hours` of a core; returns how many
    are left."""
    with tqdm(runs, unit="run") as bar:
        for done, run in enumerate(bar):
            if core_hours(results.read(path)) >= budget_hours:
                return len(runs) - done
            bar.set_description(f"{run.cell.regime} {run.cell.targets} r{run.cell.rank} {run.arm} {run.seed}")
            results.append(path, [record(run, stage, stage == CONFIRM and is_deciding(run.cell))])
    return 0


def core_hours(records: Iterable[Record]) -> float:
    """What the runs have taken of one core."""
    return sum(record["core_seconds"] for record in records) / 3600
