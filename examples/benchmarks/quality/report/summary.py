"""One row a method: what it gains on each backbone, for the page that everyone reads."""

from __future__ import annotations

from collections.abc import Sequence

from quality.jobs import SEEDS
from quality.report.data import Arm, Grid, Record, distinct, select
from quality.report.markdown import NOTHING, difference, spread, table
from quality.report.names import BASE, LORA, loss_of, measures, ordered, title
from quality.report.tables import closed

OMITTED = ("place_similarity",)


def summary_table(records: Sequence[Record]) -> str:
    """Each method's loss less LoRA's, the share of the gap to full fine-tuning that it closes, its other figures."""
    main = [record for record in select(records, stage="main") if record["seed"] in SEEDS]
    grids = {backbone: Grid.of(select(main, backbone=backbone)) for backbone in distinct(main, "backbone")}
    arms = ordered(list(dict.fromkeys(arm for grid in grids.values() for arm in grid.arms if arm.control is None)))
    columns = [(backbone, main[0]["suite"], grid) for backbone, grid in grids.items()]
    header = ["method"]
    for backbone, suite, grid in columns:
        header += [f"{backbone}: loss − LoRA", "gap closed", *(each.title for each in _others(suite, grid))]
    rows = [[title(arm), *(cell for _, suite, grid in columns for cell in _cells(grid, suite, arm))] for arm in arms]
    return table(header, [row for arm, row in zip(arms, rows, strict=True) if arm.method != BASE])


def _others(suite: str, grid: Grid) -> list:
    return [each for each in measures(suite, list(grid.cells.values()))[1:] if each.key not in OMITTED]


def _cells(grid: Grid, suite: str, arm: Arm) -> list[str]:
    loss, others = loss_of(suite), _others(suite, grid)
    if arm not in grid.arms:
        return [NOTHING] * (2 + len(others))
    to_lora = NOTHING if arm == LORA else difference(grid.difference(arm, LORA, loss), loss.digits)
    return [to_lora, closed(grid, arm), *(spread(grid.spread(arm, each), each.digits) for each in others)]
