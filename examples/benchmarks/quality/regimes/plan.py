"""What was run, as fixed before the confirmation seeds ran (results/regimes_plan.md), and running it.

Development seeds chose the rates; the confirmation seeds were run once, with those, and decide. Each run is a line of
the results file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from quality import results
from quality.regimes.image_regimes import CONVERSIONS
from quality.regimes.runs import REGIMES, Cell, Run, record_of
from quality.running import RESULTS, Settings

# ---------------------------------------------------------------------- plan

CONFIRM_SEEDS = tuple(range(200, 210))
CONFIRM = "confirm"


def is_deciding(cell: Cell) -> bool:
    """Whether `cell` is the one by which its regime is won; samples are drawn of that alone."""
    rank, steps = (16, 400) if cell.regime == "one_image" else (4, 200)
    return (cell.targets, cell.rank, cell.steps) == ("attention", rank, steps)


@dataclass(frozen=True)
class Planned:
    """A cell of the plan.

    Attributes:
        cell: what is compared.
        arms: in it.
        label: of arms that came to a cell later, and register by themselves; the cell's name without one.
    """

    cell: Cell
    arms: tuple[str, ...]
    label: str = ""

    @property
    def name(self) -> str:
        """The label; else the regime's for the cell that decides it, "…_reach" for those that say how far that goes."""
        if self.label:
            return self.label
        return self.cell.regime if is_deciding(self.cell) else f"{self.cell.regime}_reach"


_GATED = ("lora_gated", "lora_gated_samples", "nara_gated", "nara_gated_samples")
_ABLATIONS = ("nara_constant", "nara_shuffled")
_LEADING = ("lora", "lora_params", "dora", "nara")
_ALL = ("base", *_LEADING, "nara_dora", "nara_knots", "multi_lora", "tlora", "full", *_ABLATIONS)
_MOST = ("base", *_LEADING, "nara_knots", "full", *_ABLATIONS)
_FEW = ("lora", "lora_params", "nara")

_OF_ONE = ("lora", "nara", "tlora", "lora_less_noisy")
_SEEN = ("base", *_LEADING, *_ABLATIONS)
_BLIND = (*_SEEN, "nara_dora", "nara_knots")

_TO_V, *_OTHERS = CONVERSIONS
PLAN: tuple[Planned, ...] = (
    Planned(Cell(_TO_V, "attention", 4, 200), _ALL),
    *(Planned(Cell(name, "attention", 4, 200), _MOST) for name in _OTHERS),
    Planned(
        Cell("subject_low", "attention", 4, 200),
        (*_MOST, *_GATED),
    ),
    Planned(
        Cell("subject_high", "attention", 4, 200),
        (*_LEADING, *_ABLATIONS, *_GATED),
    ),
    Planned(
        Cell("two_conditions", "attention", 4, 200),
        (*_LEADING, "nara_knots", "lora_switched", *_ABLATIONS),
    ),
    Planned(
        Cell("one_image", "attention", 16, 400),
        (*_FEW, "tlora", "lora_less_noisy", *_ABLATIONS),
    ),
    Planned(Cell("one_image", "attention", 32, 400), _OF_ONE),
    Planned(Cell(_TO_V, "all", 4, 200), _MOST),
    Planned(Cell(_TO_V, "attention", 1, 200), _LEADING),
    Planned(Cell(_TO_V, "attention", 16, 200), _LEADING),
    *(Planned(Cell(name, "all", 4, 200), _FEW) for name in _OTHERS),
    Planned(Cell(_TO_V, "attention", 4, 800), _FEW),
    Planned(Cell("blind_open", "attention", 4, 200), _BLIND),
    Planned(Cell("blind_determined", "attention", 4, 200), _BLIND),
    Planned(Cell("seen_open", "attention", 4, 200), _SEEN),
    Planned(Cell("seen_determined", "attention", 4, 200), _SEEN),
    *(Planned(Cell(name, "all", 4, 200), _FEW) for name in ("blind_open", "blind_determined")),
    Planned(Cell(_TO_V, "attention", 4, 200), ("nara_diagonal",), label="eps_to_v_diagonal"),
)
"""In the order of running. Of subject_low, subject_high, two_conditions, one_image and eps_to_v_diagonal there are
records alone, which name the commit that has their code."""
NAMES = tuple(dict.fromkeys(planned.name for planned in PLAN))


def chosen(names: Sequence[str]) -> list[Planned]:
    """The cells of these names.

    Raises:
        ValueError: the plan has none of such a name.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ValueError(f"--regimes has {', '.join(unknown)}, expected of {', '.join(NAMES)}")
    return [planned for planned in PLAN if planned.name in names]


# ---------------------------------------------------------------------- running

Record = Mapping[str, Any]
Rated = tuple[Cell, str, Settings]
"""A cell, an arm in it, and the rates with which it was confirmed."""


def rated(planned: Sequence[Planned]) -> list[Rated]:
    """The arms of cells.

    Raises:
        ValueError: a regime whose code has gone; the commit in its records has it.
    """
    for entry in planned:
        if entry.cell.regime not in REGIMES or entry.label:
            raise ValueError(f"{entry.name} isn't run any more: its records name the commit that has its code.")
    return [(entry.cell, arm, rates_of(entry.cell, arm)) for entry in planned for arm in entry.arms]


def runs_of(arms: Sequence[Rated], records: Sequence[Record], seeds: Sequence[int]) -> list[Run]:
    """The runs that `records` lack, seed after seed, so that a stop leaves whole seeds."""
    runs = [Run(cell, arm, seed, rates) for seed in seeds for cell, arm, rates in arms]
    done = {key_of(record) for record in records}
    return list({key: run for run in runs if (key := key_of(run.named)) not in done}.values())


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


def key_of(record: Record) -> tuple[Any, ...]:
    """What tells a record, or a run to be made, from others: its cell, arm, seed and rates."""
    return (cell_of(record), record["arm"], record["seed"], *sorted(record["rates"].items()))
