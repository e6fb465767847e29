"""How many runs are left of the plan, and what they take of one core."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from quality.regimes.plan import CONFIRM_SEEDS, DEV, RATES_OF, Planned
from quality.regimes.rates import Record, cell_of
from quality.regimes.running import Wish, core_hours
from quality.regimes.runs import Cell

SECONDS_A_STEP = {"attention": 0.15, "all": 0.25}
"""Of one core, with its share of the measurement; where no run of a cell says better."""


def left_table(stages: Sequence[str], wish: Wish, records: Sequence[Record]) -> str:
    """As Markdown: what `wish` asks for, of it what is left, and its core hours."""
    names = ("stage", "regime", "targets", "rank", "steps", "runs", "left", "core hours left")
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    total = 0.0
    for stage in stages:
        for planned in wish.planned:
            cell = planned.cell
            wanted, left = _count(stage, planned, wish, records)
            hours = left * seconds_of(cell, records) / 3600
            total += hours
            size = f"{cell.regime} | {cell.targets} | {cell.rank} | {cell.steps}"
            rows.append(f"| {stage} | {size} | {wanted} | {left} | {hours:.2f} |")
    return "\n".join([*rows, "", f"{total:.1f} core hours left, {core_hours(records):.2f} spent"])


def seconds_of(cell: Cell, records: Iterable[Record]) -> float:
    """Of one core, for a run of `cell`: as its own records have it, or those of its targets for each step."""
    own = [r for r in records if r["targets"] == cell.targets]
    same = [r["core_seconds"] for r in own if (r["regime"], r["steps"]) == (cell.regime, cell.steps)]
    if same:
        return fmean(same)
    each = [r["core_seconds"] / r["steps"] for r in own]
    return cell.steps * (fmean(each) if each else SECONDS_A_STEP[cell.targets])


def _count(stage: str, planned: Planned, wish: Wish, records: Iterable[Record]) -> tuple[int, int]:
    """Runs that are asked for, and those that have no record."""
    arms = [arm for arm in planned.arms if wish.arms is None or arm in wish.arms]
    if stage == DEV:
        arms = [arm for arm in arms if arm not in RATES_OF]
    seeds = wish.seeds or (planned.dev_seeds if stage == DEV else CONFIRM_SEEDS)
    wanted = {arm: len(seeds) * (len(planned.trials(arm)) if stage == DEV else 1) for arm in arms}
    done = [r for r in records if r["stage"] == stage and r["arm"] in wanted and r["seed"] in seeds]
    done = [r for r in done if cell_of(r) == planned.cell]
    return sum(wanted.values()), sum(wanted.values()) - len(done)
