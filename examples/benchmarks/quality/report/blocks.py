"""Every table that a page may ask for by name: "KIND FILE BACKBONE", FILE below the folder of the results.

Those of the first kinds are of the seeds that all methods have; "more" is of the methods that have further seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmark_alternatives import report as alternatives_table

from quality.jobs import COST, SEEDS
from quality.regimes.check.table import check_table
from quality.regimes.plan import PLAN
from quality.regimes.summary import summary
from quality.report.ablations import ablations_table, singles_table, tuning_table
from quality.report.cost import cost_table
from quality.report.data import Grid, Record, distinct, read_records, select
from quality.report.names import FURTHER, loss_of
from quality.report.setting import setting
from quality.report.summary import summary_table
from quality.report.tables import bins_table, controls_table, domains_table, quality_table, resolution
from quality.results import read


@dataclass(frozen=True)
class Measured:
    """Attributes:
    records: of one backbone.
    """

    records: Sequence[Record]

    @property
    def suite(self) -> str:
        return self.records[0]["suite"]

    @cached_property
    def every(self) -> list[Record]:
        return select(self.records, stage="main")

    @cached_property
    def main(self) -> list[Record]:
        return [record for record in self.every if record["seed"] in SEEDS]

    @cached_property
    def grid(self) -> Grid:
        return Grid.of(self.main)

    @cached_property
    def further(self) -> Grid:
        """All seeds of the arms that have more than the others.

        Raises:
            ValueError: there are none.
        """
        seeds = {record["seed"] for record in self.every} - set(SEEDS)
        arms = {(record["method"], record.get("control")) for record in self.every if record["seed"] in seeds}
        if not arms:
            raise ValueError(f"no method has other seeds than {', '.join(map(str, SEEDS))}: take the table out.")
        return Grid.of(record for record in self.every if (record["method"], record.get("control")) in arms)

    def stage(self, name: str) -> list[Record]:
        return select(self.records, stage=name)


def _measure(key: str) -> Callable[[Measured], str]:
    def make(measured: Measured) -> str:
        return quality_table(measured.grid, next(m for m in FURTHER[measured.suite] if m.key == key))

    return make


def _more(measured: Measured) -> str:
    grid, loss = measured.further, loss_of(measured.suite)
    tables = (quality_table(grid, loss), bins_table(grid), controls_table(grid, loss))
    return "\n\n".join(table for table in tables if table)


KINDS: dict[str, Callable[[Measured], str]] = {
    "loss": lambda measured: quality_table(measured.grid, loss_of(measured.suite)),
    "domains": lambda measured: domains_table(measured.grid, loss_of(measured.suite)),
    "bins": lambda measured: bins_table(measured.grid),
    "controls": lambda measured: controls_table(measured.grid, loss_of(measured.suite)) or "No control ran.",
    **{measure.key: _measure(measure.key) for measures in FURTHER.values() for measure in measures},
    "resolution": lambda measured: resolution(measured.grid, measured.suite),
    "trials": lambda measured: tuning_table(measured.stage(STAGE_OF["trials"])),
    "cost": lambda measured: cost_table(measured.stage(STAGE_OF["cost"])),
    "single": lambda measured: singles_table(measured.stage(STAGE_OF["single"]), measured.main),
    "ablations": lambda measured: ablations_table(measured.stage(STAGE_OF["ablations"]), measured.main),
    "more": _more,
}
"""{kind: its table of one backbone}."""
STAGE_OF = {"trials": "tune", "cost": COST, "single": "single", "ablations": "ablation"}
"""{kind: the stage whose runs it shows}, of those that don't show the main runs."""
WHOLE: dict[str, Callable[[Sequence[Record]], str]] = {"setting": setting, "summary": summary_table}
"""{kind: its table of all backbones of a file}."""


def block(name: str, results: Path) -> str:
    """The table of that name: "loss text llada-tiny", "summary text", "regimes", "alternatives", "check".

    Raises:
        ValueError: no such kind, or nothing was measured for it.
    """
    kind, *where = name.split()
    if kind == "regimes" and not where:
        return summary(PLAN, read(results / "regimes.jsonl"))
    if kind == "alternatives" and not where:
        return alternatives_table(read(results / "alternatives.jsonl"))
    if kind == "check" and not where:
        return check_table(read(results / "check.jsonl"), read(results / "regimes.jsonl"))
    if kind in WHOLE and len(where) == 1:
        return WHOLE[kind](read_records([results / f"{where[0]}.jsonl"]))
    if kind not in KINDS or len(where) != 2:
        raise ValueError(
            f'a table is called {name!r}, expected "regimes", "alternatives", "check", "KIND FILE" with one of '
            f'{", ".join(WHOLE)}, or "KIND FILE BACKBONE" with one of {", ".join(KINDS)}.'
        )
    records = select(read_records([results / f"{where[0]}.jsonl"]), backbone=where[1])
    if not records:
        raise ValueError(f"{where[0]}.jsonl has no record of {where[1]!r}, which the table {name!r} is about.")
    return KINDS[kind](Measured(records))


def all_tables(records: Sequence[Record]) -> str:
    """Whatever tables `records` give, below headings: a report without words."""
    parts = []
    for suite in distinct(records, "suite"):
        own = select(records, suite=suite)
        parts += [f"# {suite}", setting(own)]
        for backbone in distinct(own, "backbone"):
            measured = Measured(select(own, backbone=backbone))
            for kind in _kinds_of(measured):
                parts += [f"## {backbone}: {kind}", KINDS[kind](measured)]
    return "\n\n".join(parts) + "\n"


def _kinds_of(measured: Measured) -> list[str]:
    """Those that it has runs for."""
    further = [m.key for m in FURTHER[measured.suite] if any(m(record) is not None for record in measured.main)]
    kinds = ["loss", "domains", *further, "bins", "controls"] if measured.main else []
    kinds += [kind for kind, stage in STAGE_OF.items() if measured.stage(stage)]
    return kinds + (["more"] if measured.main and len(measured.every) > len(measured.main) else [])
