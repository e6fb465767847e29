"""What was run, fixed before the confirmation seeds were: docs/results/regimes_plan.md says it in words.

Development seeds chose the rates; the confirmation seeds were run once, with those, and decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quality.regimes.images.objectives import CONVERSIONS
from quality.regimes.runs import Cell

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
