"""What is run, fixed before the confirmation seeds are: docs/results/regimes_plan.md says it in words.

Development seeds choose the rates; the confirmation seeds are run once, with those, and decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quality.jobs import Settings, rates, with_core
from quality.regimes.images.objectives import CONVERSIONS
from quality.regimes.runs import Cell

DEV_SEEDS = (100, 101, 102, 103, 104)
CONFIRM_SEEDS = tuple(range(200, 210))
DEV, CONFIRM = STAGES = ("dev", "confirm")

_PLAIN = rates(2e-3, 5e-3, 1e-2, 2e-2)
_KNOTS = with_core((5e-3, 2.5e-3), (5e-3, 1e-2), (1e-2, 2.5e-3), (1e-2, 1e-2))
_NARA = with_core((5e-3, 1e-3), (5e-3, 2.5e-3), (1e-2, 1e-3), (1e-2, 2.5e-3))
TRIALS: dict[str, tuple[Settings, ...]] = {
    **dict.fromkeys(("lora", "lora_params", "dora", "multi_lora", "tlora"), _PLAIN),
    **dict.fromkeys(("nara", "nara_dora"), _NARA),
    "nara_knots": _KNOTS,
    "base": (),
    "full": rates(5e-4, 1e-3, 2e-3, 4e-3),
}
"""Arm → the rates that development tries, equally many for each that trains."""
_TEXT_NARA = with_core((1e-2, 3e-4), (1e-2, 1e-3), (2e-2, 3e-4), (2e-2, 1e-3))
TEXT_TRIALS: dict[str, tuple[Settings, ...]] = {
    **dict.fromkeys(("lora", "lora_params", "dora"), rates(5e-3, 1e-2, 2e-2, 4e-2)),
    **dict.fromkeys(("nara", "nara_dora"), _TEXT_NARA),
    "nara_knots": with_core((1e-2, 3e-3), (1e-2, 1e-2), (2e-2, 3e-3), (2e-2, 1e-2)),
    "base": (),
}
"""… of the regimes of text, around the rates that are best on the text benchmark."""
RATES_OF = {"nara_constant": "nara", "nara_shuffled": "nara"}
"""Ablations run with the rates of what they are made of."""


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
        dev_seeds: on which each arm tries its rates.
        further: {arm: trials beside those of `grid`}, where the best was at an end of it.
        grid: {arm: trials}.
        label: of arms that came to a cell later, and register by themselves; the cell's name without one.
    """

    cell: Cell
    arms: tuple[str, ...]
    dev_seeds: tuple[int, ...] = DEV_SEEDS[:1]
    further: Mapping[str, tuple[Settings, ...]] = field(default_factory=dict)
    grid: Mapping[str, tuple[Settings, ...]] = field(default_factory=lambda: TRIALS)
    label: str = ""

    @property
    def name(self) -> str:
        """The label; else the regime's for the cell that decides it, "…_reach" for those that say how far that goes."""
        if self.label:
            return self.label
        return self.cell.regime if is_deciding(self.cell) else f"{self.cell.regime}_reach"

    def trials(self, arm: str) -> tuple[Settings, ...]:
        """The rates that development tries for `arm`."""
        return (*self.grid[arm], *self.further.get(arm, ()))


_STATIC = ("lora", "lora_params", "dora")
_FASTER = dict.fromkeys(("lora", "dora"), rates(8e-2))
_FASTER_ALL = {"lora": rates(8e-2), "nara": with_core((4e-2, 1e-3))}
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
    Planned(Cell(_TO_V, "attention", 4, 200), _ALL, DEV_SEEDS[:2]),
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
    Planned(Cell(_TO_V, "attention", 1, 200), _LEADING, further=dict.fromkeys(("lora", "dora"), rates(4e-2))),
    Planned(Cell(_TO_V, "attention", 16, 200), _LEADING),
    *(Planned(Cell(name, "all", 4, 200), _FEW) for name in _OTHERS),
    Planned(Cell(_TO_V, "attention", 4, 800), _FEW),
    Planned(Cell("blind_open", "attention", 4, 200), _BLIND, further={"dora": rates(8e-2)}, grid=TEXT_TRIALS),
    Planned(Cell("blind_determined", "attention", 4, 200), _BLIND, further=_FASTER, grid=TEXT_TRIALS),
    Planned(Cell("seen_open", "attention", 4, 200), _SEEN, further=_FASTER, grid=TEXT_TRIALS),
    Planned(Cell("seen_determined", "attention", 4, 200), _SEEN, grid=TEXT_TRIALS),
    *(
        Planned(Cell(name, "all", 4, 200), _FEW, further=_FASTER_ALL, grid=TEXT_TRIALS)
        for name in ("blind_open", "blind_determined")
    ),
    Planned(Cell(_TO_V, "attention", 4, 200), ("nara_diagonal",), DEV_SEEDS[:2], label="eps_to_v_diagonal"),
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
