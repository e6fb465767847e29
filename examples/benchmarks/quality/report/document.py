"""RESULTS.md: sections in their order, each from records alone; prose that no program can write from the notes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality.jobs import COST, SEEDS
from quality.report.ablations import ablations_table, singles_table, tuning_table
from quality.report.cost import cost_table
from quality.report.data import Grid, Record, distinct, select
from quality.report.design import DESIGN
from quality.report.figures import controls_figure, loss_figure
from quality.report.goals import goals_table
from quality.report.markdown import listed
from quality.report.names import SUITES, loss_of, measures
from quality.report.repeating import repeat
from quality.report.samples import samples_sheet
from quality.report.tables import (
    bins_table,
    controls_table,
    domains_table,
    quality_table,
    rates_table,
    resolution,
)
from quality.step_cost import PAIRS

HOW_TO_READ = """\
± is the standard deviation over seeds. A difference is paired: within a seed all methods see the same data in the same
order, the same noise levels and the same noise or masks; its 95 % interval over the seeds (Student's t) follows in
brackets, and it is **bold** where that interval doesn't hold zero. *Gap closed* is (LoRA − method) / (LoRA − full
fine-tuning) of the mean loss. Bins of λ are tenths of [0, 1], named by their middle; 1 is pure noise; in the tables
over them a difference stands ± half the width of its 95 % interval."""
COST_NOTE = f"""\
A step of each method and one of LoRA, in turn, {PAIRS} of each in one process: the median time of a step, and the
median of the pairs' ratios with their quartiles. Memory is what a step holds at its largest, counted in tensors
(weights, gradients, Adam's moments, what the forward keeps for the backward), without the temporaries of single
operations."""
BY_DOMAIN = """\
Domain by domain, the difference to LoRA, of DoRA's variants to DoRA, and of a control to what it controls:"""
NOTES = ("summary", "setting", "text", "images", "learned", "failed")


def read_notes(path: Path | None) -> dict[str, str]:
    """The hand-written parts: a name of `NOTES` → the text below the heading of that name. That of a suite stands in
    place of its `DESIGN`.

    Raises:
        ValueError: a heading of the file that names no part.
    """
    if path is None or not path.exists():
        return {}
    parts = re.split(r"^# (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    notes = {name.strip().lower(): text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    unknown = sorted(notes.keys() - set(NOTES))
    if unknown:
        known = listed(["# " + name for name in NOTES])
        raise ValueError(f"{path} has headings that name no part of the report, {listed(unknown)}: expected {known}.")
    return notes


def document(records: Sequence[Record], notes: dict[str, str], figures: Path, link: str) -> str:
    """The text of RESULTS.md; writes its pictures.

    Args:
        records: all that was measured.
        notes: of `read_notes`.
        figures: folder of the pictures.
        link: how the text names that folder.
    """
    parts = ["# Results", notes.get("summary", ""), "## Setting", notes.get("setting", ""), *setting(records)]
    after = (("## What was learned", "learned"), ("## What failed", "failed"))
    parts += ["How to read the tables:", HOW_TO_READ]
    for suite in distinct(records, "suite"):
        for backbone in distinct(select(records, suite=suite), "backbone"):
            own = select(records, suite=suite, backbone=backbone)
            parts += section(own, suite, backbone, figures, link, notes.get(suite))
    parts += [text for heading, name in after if name in notes for text in (heading, notes[name])]
    parts += repeat(records)
    return "\n\n".join(part for part in parts if part) + "\n"


def setting(records: Sequence[Record]) -> list[str]:
    """Where, with what, and how often."""
    lines = []
    main = select(records, stage="main")
    for suite, backbone in dict.fromkeys((record["suite"], record["backbone"]) for record in main):
        own = select(main, suite=suite, backbone=backbone)
        seeds = sorted(set(distinct(own, "seed")))
        usual, further = [s for s in seeds if s in SEEDS], [s for s in seeds if s not in SEEDS]
        what = f"{backbone}; {listed(distinct(own, 'domain'))}; {len(usual)} seeds ({listed(usual)})"
        more = f", {len(further)} more of some methods ({listed(further)})" if further else ""
        lines.append(f"* {SUITES.get(suite, suite)}: {what}{more}; {len(own)} records.")
    for name, title in (("hardware", "Hardware"), ("versions", "Versions"), ("commit", "Commits")):
        values = list(dict.fromkeys(_plain(record[name]) for record in records if record.get(name)))
        if values:
            lines.append(f"* {title}: {'; '.join(values)}.")
    lines.append(f"* All runs together took {hours(records):.1f} hours of one core.")
    return ["\n".join(lines)]


def hours(records: Sequence[Record]) -> float:
    """Of all runs. One run's records, of itself and of its controls, each count the time since the run began."""
    seconds: dict[str, float] = {}
    for number, record in enumerate(records):
        run = record.get("job") or str(number)
        seconds[run] = max(seconds.get(run, 0.0), record.get("seconds") or 0.0)
    return sum(seconds.values()) / 3600


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, text in value.items() if text is not None)
    return str(value)


def section(
    records: Sequence[Record], suite: str, backbone: str, figures: Path, link: str, design: str | None = None
) -> list[str]:
    """Everything about one backbone; `design` says how it was measured, if not as `DESIGN` has it."""
    every, name = select(records, stage="main"), f"{SUITES.get(suite, suite)}: {backbone}{_rank(records)}"
    main = [record for record in every if record["seed"] in SEEDS]
    parts = [f"## {name}", design or DESIGN.get(suite, "")]
    if main:
        grid = Grid.of(main)
        parts += ["### What had to be reached", _which_seeds(every), goals_table(grid, suite) or ""]
        for measure in measures(suite, main):
            parts += [f"### {measure.title.capitalize()}", quality_table(grid, measure)]
            parts += [_resolution(grid, suite)] if measure.lower_is_better else []
            parts += [BY_DOMAIN, domains_table(grid, measure)] if len(grid.domains) > 1 else []
        stem = f"{suite}-{backbone}"
        loss_figure(grid, figures / f"{stem}-loss.png", name)
        parts += ["### Loss over the noise level", f"![loss over λ]({link}/{stem}-loss.png)", bins_table(grid)]
        parts += ["### Controls", *(controls_table(grid, measure) or "" for measure in measures(suite, main))]
        if controls_figure(grid, figures / f"{stem}-controls.png", name):
            parts.append(f"![controls over λ]({link}/{stem}-controls.png)")
        parts += sheets(grid, figures, link, stem)
        parts += ["### Settings, as tuned", rates_table(grid)]
    parts += more_seeds(every, suite)
    tried = select(records, stage="tune")
    parts += ["### Learning rates that were tried", tuning_table(tried)] if tried else []
    priced = select(records, stage=COST)
    parts += ["### Cost", COST_NOTE, cost_table(priced)] if priced else []
    for stage, heading, make in (("single", "One seed", singles_table), ("ablation", "Ablations", ablations_table)):
        own = select(records, stage=stage)
        parts += [f"### {heading}", make(own, main)] if own else []
    return parts


def _which_seeds(main: Sequence[Record]) -> str:
    """That there are seeds beside those of the tables; nothing if there aren't."""
    usual = sorted({record["seed"] for record in main} & set(SEEDS))
    if all(record["seed"] in SEEDS for record in main):
        return ""
    return f'By the seeds {listed(usual)}; "More seeds" below has what further seeds of some methods say.'


def more_seeds(main: Sequence[Record], suite: str) -> list[str]:
    """Of the methods that have more seeds than the others: all of theirs together; nothing if there are none."""
    further = sorted({record["seed"] for record in main} - set(SEEDS))
    if not further:
        return []
    arms = {(record["method"], record.get("control")) for record in main if record["seed"] in further}
    grid = Grid.of(record for record in main if (record["method"], record.get("control")) in arms)
    heading = f"These methods have the seeds {listed(further)} as well. Here are all of theirs, the first ones too:"
    loss = loss_of(suite)
    tables = (goals_table(grid, suite), quality_table(grid, loss), bins_table(grid), controls_table(grid, loss))
    return ["### More seeds", heading, *(table or "" for table in tables)]


def _rank(records: Sequence[Record]) -> str:
    """Of the main runs, as a title has it."""
    ranks = [rank for rank in distinct(select(records, stage="main"), "rank") if rank is not None]
    return f", r = {listed(ranks)}" if ranks else ""


def sheets(grid: Grid, figures: Path, link: str, stem: str) -> list[str]:
    """A sheet of samples for each domain that has some."""
    names = [name for name in grid.domains if samples_sheet(grid, name, figures / f"{stem}-{name}.png")]
    if not names:
        return []
    heading = "Of the first seed and from the same noise: the prompt alone, then each place."
    return ["### Samples", heading, *(f"![samples of {name}]({link}/{stem}-{name}.png)" for name in names)]


def _resolution(grid: Grid, suite: str) -> str:
    found = resolution(grid)
    if found is None:
        return ""
    error, gap = found
    digits = loss_of(suite).digits
    if gap <= 0:
        return f"LoRA isn't worse than full fine-tuning here (by {-gap:.{digits}f}): there is no gap to close."
    of_what = "gain over the backbone as it is" if suite == "images" else "loss"
    return (
        f"The standard error of one run's {of_what}, from the spread over validation samples, is {error:.{digits}f}, "
        f"{error / gap:.0%} of the gap from LoRA to full fine-tuning, {gap:.{digits}f}. (Differences of two runs are "
        "taken on the same samples, and vary less.)"
    )
