"""Tables of the runs beside the main comparison: tuning, ablations, and methods that ran on one seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from quality.report_data import Arm, Grid, Record, select
from quality.report_markdown import NOTHING, difference, signed, spread, table
from quality.report_names import LORA, LOSS, measures, ordered, title

_MISSING = "default"


def variations(records: Sequence[Record], main: Sequence[Record]) -> dict[str, list[Record]]:
    """{"core_scale = 1.0": its records}: settings in which a record differs from the main runs of its method."""
    found: dict[str, list[Record]] = {}
    for record in records:
        same = select(main, method=record["method"], domain=record["domain"], control=record.get("control"))
        reference = all_settings(same[0]) if same else {}
        found.setdefault(_label(record, reference), []).append(record)
    return dict(sorted(found.items()))


def all_settings(record: Record) -> dict[str, Any]:
    """What a run was made with, by name."""
    named = {name: record.get(name) for name in ("learning_rate", "core_learning_rate", "rank", "steps")}
    return {**named, **(record.get("settings") or {})}


def _label(record: Record, reference: dict[str, Any]) -> str:
    own = all_settings(record)
    changed = [name for name in sorted({*own, *reference}) if own.get(name) != reference.get(name)]
    settings = [f"{name} = {_value(own.get(name, _MISSING))}" for name in changed]
    return f"{title(Arm(record['method'], record.get('control')))}: {', '.join(settings) or 'as in the main runs'}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def ablations_table(records: Sequence[Record], main: Sequence[Record]) -> str:
    """A row a variation: its loss, and the difference to the main runs of its method and of LoRA, over common seeds."""
    domains = {record["domain"] for record in records}
    rows = []
    for label, group in variations(records, main).items():
        arm = Arm(group[0]["method"], group[0].get("control"))
        varied = Arm(label)
        relabelled = [{**record, "method": label, "control": None} for record in group]
        grid = Grid.of([*(record for record in main if record["domain"] in domains), *relabelled])
        to_own = difference(grid.difference(varied, arm, LOSS), LOSS.digits)
        to_lora = difference(grid.difference(varied, LORA, LOSS), LOSS.digits)
        figures = [
            spread(grid.spread(varied, measure), measure.digits) for measure in measures(group[0]["suite"], group)
        ]
        rows.append([label, str(len(grid.per_seed(varied, LOSS))), *figures, to_own, to_lora])
    titles = [measure.title for measure in measures(records[0]["suite"], records)]
    return table(["", "seeds", *titles, "loss − main run", "loss − LoRA"], rows)


def singles_table(records: Sequence[Record], main: Sequence[Record]) -> str:
    """Methods that ran on few seeds, beside LoRA on the same: mean figures without intervals."""
    suite = records[0]["suite"]
    shown = measures(suite, [*records, *select(main, method="lora")])
    grid = Grid.of([*select(main, method="lora", control=None), *records])
    seeds = {record["seed"] for record in records}
    domains = [name for name in grid.domains if name in {record["domain"] for record in records}]
    rows = []
    for arm in ordered(grid.arms):
        row = [title(arm)]
        for measure in shown:
            values = {s: v for s, v in grid.per_seed(arm, measure, domains).items() if s in seeds}
            row.append(f"{sum(values.values()) / len(values):.{measure.digits}f}" if values else NOTHING)
        rows.append([*row, _to_lora(grid, arm, domains, seeds)])
    return table(["one seed", *(measure.title for measure in shown), "loss − LoRA"], rows)


def _to_lora(grid: Grid, arm: Arm, domains: list[str], seeds: set[int]) -> str:
    own, other = grid.per_seed(arm, LOSS, domains), grid.per_seed(LORA, LOSS, domains)
    common = [own[seed] - other[seed] for seed in own if seed in other and seed in seeds]
    return signed(sum(common) / len(common), LOSS.digits) if common and arm != LORA else NOTHING


def tuning_table(records: Sequence[Record]) -> str:
    """Each method's trials with their loss, the mean over the domains that tuning used; the best is bold."""
    found: dict[Arm, dict[str, list[float]]] = {}
    for record in records:
        loss = record["validation_loss"]
        trials = found.setdefault(Arm(record["method"]), {})
        trials.setdefault(_rates(record), []).append(math.inf if loss is None else loss)
    rows = []
    for arm in ordered(list(found)):
        means = {rates: fmean(losses) for rates, losses in found[arm].items()}
        best = min(means, key=means.__getitem__)
        texts = [f"{rates}: {_loss(mean)}" for rates, mean in means.items()]
        rows.append([title(arm), *(f"**{t}**" if rates == best else t for rates, t in zip(means, texts, strict=True))])
    width = max(len(row) for row in rows)
    header = ["", *(f"trial {number}" for number in range(1, width))]
    return table(header, [[*row, *[NOTHING] * (width - len(row))] for row in rows])


def _rates(record: Record) -> str:
    trial = record.get("trial") or {name: record.get(name) for name in ("learning_rate", "core_learning_rate")}
    return ", ".join(f"{value:g}" for value in trial.values() if value is not None)


def _loss(mean: float) -> str:
    return "diverged" if math.isinf(mean) else f"{mean:.{LOSS.digits}f}"
