"""What had to be reached, and whether it was: each goal a row, judged by the intervals alone.

Text, of a noise-aware method against its baseline (LoRA, or DoRA for a DoRA): a lower loss in every bin of λ; a lower
mean loss, the interval clear of zero; no higher a mean loss than Multi-LoRA's (of LoRAs); its controls worse, clear of
zero. Images: similarity and text alignment no worse than the baseline's, one of the two better, clear of zero. "No
worse" is an interval that isn't all below zero, and whose lower end is above −0.01, a hundredth of what a cosine goes
up to: one that holds zero because it is wide doesn't say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from quality.report.data import Arm, Grid, above_zero, below_zero
from quality.report.markdown import NOTHING, difference, table
from quality.report.names import FURTHER, LORA, LOSS, MULTI_LORA, baseline_of, candidates, title
from quality.report.tables import bin_value, noise_levels

TEXT_CONTROLS = ("constant", "mean_core")
MARGIN = 0.01
IMAGE_MEASURES = FURTHER["images"][:2]


@dataclass(frozen=True)
class Goal:
    """Attributes:
    name: what was asked.
    figure: what was measured.
    reached: None if it wasn't measured.
    """

    name: str
    figure: str
    reached: bool | None

    @property
    def row(self) -> list[str]:
        return [self.name, self.figure, {True: "yes", False: "no", None: "not measured"}[self.reached]]


def goals_table(grid: Grid, suite: str) -> str | None:
    """All goals of all noise-aware methods; None if no such method ran."""
    goals = [goal for arm in candidates(grid) for goal in (image_goals if suite == "images" else text_goals)(grid, arm)]
    return table(["goal", "measured", "reached"], [goal.row for goal in goals]) if goals else None


def text_goals(grid: Grid, arm: Arm) -> list[Goal]:
    baseline = baseline_of(arm.method)
    pair = f"{title(arm)} against {title(baseline)}"
    mean = grid.difference(arm, baseline, LOSS)
    bins = [grid.difference(arm, baseline, bin_value(index)) for index in range(len(noise_levels(grid)))]
    known = [found for found in bins if found is not None]
    lower = sum(found.mean < 0 for found in known)
    goals = [
        Goal(
            f"{pair}: lower loss in every bin of λ",
            f"{lower} of {len(bins)} bins, in {sum(below_zero(found) for found in known)} clear of zero",
            lower == len(bins) if known else None,
        ),
        Goal(
            f"{pair}: mean loss lower, clear of zero", difference(mean, 4), None if mean is None else below_zero(mean)
        ),
    ]
    if baseline == LORA:
        against = grid.difference(arm, MULTI_LORA, LOSS) if MULTI_LORA in grid.arms else None
        name = f"{title(arm)}: mean loss no higher than {title(MULTI_LORA)}'s"
        goals.append(Goal(name, difference(against, 4), None if against is None else against.mean <= 0))
    for control in TEXT_CONTROLS:
        worse = grid.difference(Arm(arm.method, control), arm, LOSS)
        name = f"{title(Arm(arm.method, control))}: worse than the method itself, clear of zero"
        goals.append(Goal(name, difference(worse, 4), None if worse is None else above_zero(worse)))
    return goals


def image_goals(grid: Grid, arm: Arm) -> list[Goal]:
    baseline = baseline_of(arm.method)
    pair = f"{title(arm)} against {title(baseline)}"
    found = {measure: grid.difference(arm, baseline, measure) for measure in IMAGE_MEASURES}
    goals = [
        Goal(
            f"{pair}: {measure.title} no worse (by {MARGIN} at most, and not clear of zero)",
            difference(interval, measure.digits),
            None if interval is None else interval.low >= -MARGIN and not below_zero(interval),
        )
        for measure, interval in found.items()
    ]
    known = [interval for interval in found.values() if interval is not None]
    better = [measure.title for measure, interval in found.items() if above_zero(interval)]
    reached = None if not known else bool(better)
    goals.append(Goal(f"{pair}: one of the two better, clear of zero", ", ".join(better) or NOTHING, reached))
    return goals
