"""Makes the tables and pictures of RESULTS.md and of the pages in results/ from the records, and nothing else.

    python examples/benchmarks/report_quality.py                                    # the committed results, in place
    python examples/benchmarks/report_quality.py --results outputs/quality/*.jsonl  # yours, to --output_dir

People write the pages; the program fills in what stands between the marks of a table (quality/report/blocks.py). Of
other results it writes all tables without words.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from quality.report import blocks
from quality.report.data import Grid, Record, distinct, read_records, select
from quality.report.figures import controls_figure, loss_figure
from quality.report.tables import SUITES
from quality.running import SEEDS

from nara_diffusion.utils.files import atomic_write

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
DRAWN = ("images.jsonl", "text.jsonl")  # those with pictures
RESULT_PAGES = ("text", "images", "rank4", "regimes", "alternatives", "blocks", "few_steps", "check", "one_picture")
PAGES = ("RESULTS.md", *(f"examples/benchmarks/results/{name}.md" for name in RESULT_PAGES))


def filled(page: Path, results: Path = RESULTS) -> str:
    """The text of a page with the tables that the records of the folder `results` make."""
    return blocks.filled(page.read_text(encoding="utf-8"), results)


def write_pictures(records: Sequence[Record], folder: Path) -> None:
    """For each backbone SUITE-BACKBONE-loss.png, and SUITE-BACKBONE-controls.png if controls ran."""
    main = [record for record in select(records, stage="main") if record["seed"] in SEEDS]
    for suite, backbone in dict.fromkeys((record["suite"], record["backbone"]) for record in main):
        grid = Grid.of(select(main, suite=suite, backbone=backbone))
        name = f"{SUITES.get(suite, suite)}: {backbone}, r = {_rank(grid)}"
        loss_figure(grid, folder / f"{suite}-{backbone}-loss.png", name)
        controls_figure(grid, folder / f"{suite}-{backbone}-controls.png", name)


def _rank(grid: Grid) -> str:
    ranks = distinct(grid.cells.values(), "rank")
    return ", ".join(str(rank) for rank in ranks if rank is not None)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partly:
        partly.write_text(text, encoding="utf-8")


def main(results: list[Path] | None = None, output_dir: Path = Path("outputs/quality")) -> None:
    """Writes what the module says.

    Args:
        results: JSON Lines files; None means the committed ones, whose pages are filled in.
        output_dir: folder of tables.md and its pictures, of other results.

    Raises:
        ValueError: no results, or a line of them can't be used, or a page asks for a table that there isn't.
    """
    if results is None:
        for name in PAGES:
            write(ROOT / name, filled(ROOT / name))
        for name in DRAWN:
            write_pictures(read_records([RESULTS / name]), RESULTS)
        return
    records = read_records(results)
    write(output_dir / "tables.md", blocks.all_tables(records))
    write_pictures(records, output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", type=Path, help="JSON Lines files (default: the committed ones)")
    where = "folder of the tables and pictures of --results (default: %(default)s)"
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"), help=where)
    try:
        main(**vars(parser.parse_args()))
    except ValueError as error:
        sys.exit(f"error: {error}")
