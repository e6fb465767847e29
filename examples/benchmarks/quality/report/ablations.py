"""Tables of the runs beside the main comparison: tuning, ablations, and methods that ran on one seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from quality.report.data import Arm, Grid, Record, select
from quality.report.markdown import NOTHING, difference, signed, spread, table
from quality.report.names import LORA, LOSS, baseline_of, measures, ordered, title

_MISSING = "default"


def variations(records: Sequence[Record], main: Sequence[Record]) -> dict[tuple[Arm, str], list[Record]]:
    """{(arm, "core_scale = 1"): its records}: the settings in which records differ from the main runs of their arm."""
    found: dict[tuple[Arm, str], list[Record]] = {}
    for record in records:
        same = select(main, method=record["method"], domain=record["domain"], control=record.get("control"))
        reference = all_settings(same[0]) if same else {}
        arm = Arm(record["method"], record.get("control"))
        found.setdefault((arm, _changes(all_settings(record), reference)), []).append(record)
    return found


def all_settings(record: Record) -> dict[str, Any]:
    """What a run was made with, by name."""
    named = {name: record.get(name) for name in ("learning_rate", "core_learning_rate", "rank", "steps")}
    return {**named, **(record.get("settings") or {})}


def _changes(own: dict[str, Any], reference: dict[str, Any]) -> str:
    names = [name for name in sorted({*own, *reference}) if own.get(name) != reference.get(name)]
    return ", ".join(f"{name} = {_value(own.get(name, _MISSING))}" for name in names) or "as in the main runs"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def ablations_table(records: Sequence[Record], main: Sequence[Record]) -> str:
    """A row a variation: its figures, and the difference of its loss to the main runs of its method, and to its
    baseline, LoRA or DoRA: with the same variation where that was run, else as in the main runs; over common seeds."""
    domains = {record["domain"] for record in records}
    varied = variations(records, main)
    relabelled = [
        {**record, "method": _name(arm, label), "control": None}
        for (arm, label), group in varied.items()
        for record in group
    ]
    grid = Grid.of([*(record for record in main if record["domain"] in domains), *relabelled])
    shown = measures(records[0]["suite"], records)
    rows = []
    order = ordered([arm for arm, _ in varied])
    for arm, label in sorted(varied, key=lambda key: (order.index(key[0]), key[1])):
        own = Arm(_name(arm, label))
        baseline = baseline_of(arm.method)
        same = (baseline, label) in varied
        other = Arm(_name(baseline, label)) if same else baseline
        figures = [spread(grid.spread(own, measure), measure.digits) for measure in shown]
        to_main = difference(grid.difference(own, arm, LOSS), LOSS.digits)
        to_baseline = NOTHING if own == other else difference(grid.difference(own, other, LOSS), LOSS.digits)
        note = f" ({label})" if same and own != other else ""
        rows.append([own.method, str(len(grid.per_seed(own, LOSS))), *figures, to_main, f"{to_baseline}{note}"])
    return table(["", "seeds", *(m.title for m in shown), "loss − main run", "loss − LoRA or DoRA"], rows)


def _name(arm: Arm, label: str) -> str:
    return f"{title(arm)}: {label}"


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
