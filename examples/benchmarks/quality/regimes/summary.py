"""One row a regime whose confirmation is whole: what the arms that matter scored, and which form of NaRA won."""

from __future__ import annotations

from collections.abc import Sequence

from quality.regimes.plan import Planned, is_deciding
from quality.regimes.report import CANDIDATES, DIGITS, Confirmed, conditions, confirmed
from quality.regimes.running import Record
from quality.report.data import Arm
from quality.report.markdown import NOTHING, change, table
from quality.report.names import title

SHOWN = {
    "lora": "LoRA",
    "lora_params": "LoRA, NaRA's parameters",
    "dora": "DoRA",
    "nara": "NaRA",
    "nara_constant": "NaRA told λ = 0.5",
    "nara_knots": "NaRA-Knots",
    "full": "all weights",
}


def summary(plan: Sequence[Planned], records: Sequence[Record]) -> str:
    """As a table; in words that none is whole yet."""
    cells = [cell for cell in (confirmed(planned, records) for planned in plan if not planned.label) if cell.is_whole]
    if not cells:
        return "No regime's confirmation is whole yet."
    header = ["regime", *SHOWN.values(), "NaRA − LoRA", "won by"]
    return table(header, [_row(cell) for cell in cells])


def _row(cell: Confirmed) -> list[str]:
    each = cell.planned.cell
    name = each.regime if is_deciding(each) else f"{each.regime}, {each.targets}, rank {each.rank}, {each.steps} steps"
    scores = [cell.score(arm) for arm in SHOWN]
    means = [NOTHING if score is None else f"{score.mean:.3f}" for score in scores]
    return [name, *means, change(cell.difference("nara", "lora"), DIGITS), winners(cell)]


def winners(cell: Confirmed) -> str:
    """The forms of NaRA that meet every condition of the plan; nothing where the cell doesn't decide its regime."""
    if not is_deciding(cell.planned.cell):
        return NOTHING
    won = [arm for arm in CANDIDATES if arm in cell.arms and all(conditions(cell, arm).values())]
    return ", ".join(title(Arm(arm)) for arm in won) or "none"
