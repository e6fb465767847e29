"""Tables in pages that people write: what stands between two marks is made from the records, the rest is left alone.

<!-- table: loss text llada-tiny -->
…
<!-- end of table -->

A table's name is "KIND FILE BACKBONE", FILE below the folder of the results. Kinds that aren't here (settings, trials,
cost, methods on one seed, ablations) are left as they are: the records name the commit that has their code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmark_few_steps import cells_table, costs_report, seconds_table

from quality.blocks.report import answers_table, bayes_table, longer_table, one_pass_table, page_table, twins_table
from quality.regimes import alternatives
from quality.regimes.checked import check_table
from quality.regimes.plan import PLAN
from quality.regimes.report import summary
from quality.report import front
from quality.report.data import Grid, Record, distinct, read_records, select
from quality.report.one_picture import one_picture_table
from quality.report.tables import (
    FURTHER,
    Measure,
    bins_table,
    controls_table,
    domains_table,
    loss_of,
    quality_table,
)
from quality.results import read
from quality.running import SEEDS

_END = "<!-- end of table -->"
_BLOCK = re.compile(
    rf"(?P<mark><!-- table: (?P<name>[^>]+?) -->\n)\n(?P<table>.*?)\n\n(?={re.escape(_END)})", re.DOTALL
)


def _measured(measure: Measure) -> Callable[[Grid, str], str]:
    return lambda grid, suite: quality_table(grid, measure)


KINDS: dict[str, Callable[[Grid, str], str]] = {
    "loss": lambda grid, suite: quality_table(grid, loss_of(suite)),
    "domains": lambda grid, suite: domains_table(grid, loss_of(suite)),
    **{measure.key: _measured(measure) for measures in FURTHER.values() for measure in measures},
    "bins": lambda grid, suite: bins_table(grid),
    "controls": lambda grid, suite: controls_table(grid, loss_of(suite)) or "No control ran.",
}
"""{kind: the table of one backbone, of its runs and the suite's name}."""
OF_REGIMES: dict[str, Callable[[Path], str]] = {
    "regimes": lambda folder: summary(PLAN, read(folder / "regimes.jsonl")),
    "asked": front.asked_table,
    "ordinary": front.ordinary_table,
    "alternatives": lambda folder: alternatives.front(read(folder / "alternatives.jsonl")),
    "canvas": page_table,
    "canvas_twins": twins_table,
    "canvas_one_pass": one_pass_table,
    "canvas_longer": longer_table,
    "canvas_case": partial(answers_table, task="case"),
    "canvas_plain": partial(answers_table, task="plain"),
    "few_steps": lambda folder: cells_table(read(folder / "few_steps.jsonl")),
    "few_steps_seconds": lambda folder: seconds_table(read(folder / "few_steps.jsonl")),
    "few_steps_costs": lambda folder: costs_report(read(folder / "few_steps.jsonl")),
    "canvas_bayes": lambda folder: bayes_table(),
    "one_picture": one_picture_table,
    "check": lambda folder: check_table(read(folder / "check.jsonl"), read(folder / "regimes.jsonl")),
}


def filled(page: str, results: Path) -> str:
    """`page` with the tables that the records of the folder `results` make.

    Raises:
        ValueError: a mark without its end, or a table of what wasn't measured.
    """
    if page.count("<!-- table:") != page.count(_END):
        raise ValueError(f'each "<!-- table: … -->" needs a line "{_END}" of its own after it.')
    return _BLOCK.sub(lambda found: f"{found['mark']}\n{block(found['name'], results) or found['table']}\n\n", page)


def block(name: str, results: Path) -> str | None:
    """The table "loss text llada-tiny", "regimes", "alternatives"; None of an unknown kind."""
    kind, *where = name.split()
    if kind in OF_REGIMES:
        return OF_REGIMES[kind](results)
    if kind not in KINDS:
        return None
    records = read_records([results / f"{where[0]}.jsonl"])
    main = main_runs(records, where[1])
    if not main:
        raise ValueError(f"{where[0]}.jsonl has no record of {where[1]!r}, which the table {name!r} is about.")
    return KINDS[kind](Grid.of(main), main[0]["suite"])


def main_runs(records: Sequence[Record], backbone: str) -> list[Record]:
    """Those of the seeds that all methods have."""
    return [record for record in select(records, stage="main", backbone=backbone) if record["seed"] in SEEDS]


def all_tables(records: Sequence[Record]) -> str:
    """Whatever tables `records` give, below headings: a report without words."""
    parts = []
    for backbone in distinct(records, "backbone"):
        main = main_runs(records, backbone)
        for kind, make in KINDS.items() if main else ():
            if kind not in _FIGURES or any(kind in record for record in main):
                parts += [f"## {backbone}: {kind}", make(Grid.of(main), main[0]["suite"])]
    return "\n\n".join(parts) + "\n"


_FIGURES = [measure.key for measures in FURTHER.values() for measure in measures]
