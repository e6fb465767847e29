"""The front of a windowed regime: what finished adapters give inside of the window, and what they move outside.

strength     the whole update times s, as a user turns an adapter down
λ-strength   1 inside of the window, s outside (StrengthSchedule); s = 0 is a gate that is put on after training

Against the loss inside of the window stand the drift outside, and how well samples agree with their prompts. Models are
those of the first confirmation seed, trained again here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nara_diffusion import StrengthSchedule
from nara_diffusion.tuner.strength.set_strength import set_strength
from nara_diffusion.utils.atomic_write import atomic_write
from quality.regimes.images.data import SUBJECT
from quality.regimes.images.samples import sampled
from quality.regimes.images.windowed import Windowed
from quality.regimes.methods import ARMS
from quality.regimes.plan import Planned
from quality.regimes.rates import Record, chosen_rates
from quality.regimes.runs import REGIMES, Run, train
from quality.report.figures import COLOURS, save

SCALED = ("lora", "lora_params", "dora", "nara", "nara_knots")
GATED = ("lora_gated", "nara_gated")
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
OUTSIDE = (0.0, 0.25, 0.5)
PLAIN, SCHEDULED = "strength", "λ-strength"
DIGITS = 5


@dataclass(frozen=True)
class Point:
    """Attributes:
    arm: trained.
    kind: `PLAIN` or `SCHEDULED`.
    strength: s.
    inside, drift: as `Windowed.figures` has them.
    similarity, alignment: of samples, as `samples` has them.
    """

    arm: str
    kind: str
    strength: float
    inside: float
    drift: float
    similarity: float
    alignment: float


def points_of(planned: Planned, records: Sequence[Record], seed: int) -> Iterator[Point]:
    """Of every arm of the cell that the front has."""
    regime = REGIMES[planned.cell.regime]
    assert isinstance(regime, Windowed)
    for arm in planned.arms:
        if arm not in (*SCALED, *GATED):
            continue
        model = train(Run(planned.cell, arm, seed, chosen_rates(records, planned, arm))).model
        kinds = [(SCHEDULED, 0.0)] if arm in GATED else [*_each(PLAIN, STRENGTHS), *_each(SCHEDULED, OUTSIDE)]
        for kind, strength in kinds:
            set_strength(model, "default", strength if kind == PLAIN else outside(regime, strength))
            figures = regime.figures(model, ARMS[arm].gated)
            drawn = sampled(regime.load().pipe, model, "eps", SUBJECT, seed)
            values = (figures["inside"], figures["drift"], drawn["similarity"], drawn["alignment"])
            yield Point(arm, kind, strength, *(round(value, DIGITS) for value in values))


def outside(regime: Windowed, strength: float) -> StrengthSchedule:
    """1 inside of the regime's window, `strength` elsewhere."""
    low, high = regime.window
    edge, values = (high, (1.0, strength)) if low == 0 else (low, (strength, 1.0))
    return StrengthSchedule([(edge, value) for value in values])


def write_front(points: Sequence[Point], picture: Path, table: Path) -> None:
    """The points as a CSV table, and as a picture: left the drift, right the agreement with prompts."""
    with atomic_write(table) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, points))
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, colour in zip(dict.fromkeys(point.arm for point in points), COLOURS, strict=False):
        for kind, style in ((PLAIN, "o-"), (SCHEDULED, "s--")):
            own = [point for point in points if (point.arm, point.kind) == (arm, kind)]
            if not own:
                continue
            label = arm if kind == PLAIN or arm in GATED else None
            style = "*" if arm in GATED else style
            for axes, measure in ((left, "drift"), (right, "alignment")):
                values = [[getattr(point, name) for point in own] for name in ("inside", measure)]
                axes.plot(*values, style, color=colour, label=label, linewidth=1.2, markersize=9 if style == "*" else 4)
    left.set(xlabel="loss inside of the window / the base's", ylabel="drift outside")
    left.set_yscale("symlog", linthresh=1e-4)
    right.set(xlabel="loss inside of the window / the base's", ylabel="agreement of samples and prompts")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    save(figure, picture)


def _each(kind: str, strengths: Sequence[float]) -> list[tuple[str, Any]]:
    return [(kind, strength) for strength in strengths]
