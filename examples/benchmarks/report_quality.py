"""Makes RESULTS.md and its pictures from what examples/benchmarks/benchmark_quality.py measured, and from nothing else.

    python examples/benchmarks/report_quality.py
    python examples/benchmarks/report_quality.py --results examples/benchmarks/results/rank4/*.jsonl \\
        --notes docs/rank4/notes.md --output docs/rank4/RESULTS.md --figures docs/rank4/figures

The prose comes from docs/results_notes.md or --notes, which people write, below the headings "# Summary", "# Setting",
"# Learned" and "# Failed"; none of them has to be there. What stands below "# Text" and "# Images" says how a suite was
measured, where that was otherwise than now.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from quality.report.data import read_records
from quality.report.document import document, read_notes
from quality.report.markdown import rebased

from nara_diffusion.utils.atomic_write import atomic_write

ROOT = Path(__file__).parents[2]
RESULTS = [Path(__file__).parent / "results" / f"{suite}.jsonl" for suite in ("images", "text")]
NOTES = ROOT / "docs" / "results_notes.md"  # of RESULTS; its links are those of RESULTS.md


def main(
    results: list[Path] | None = None,
    notes: Path | None = None,
    output: Path | None = None,
    figures: Path | None = None,
) -> str:
    """Writes `output` and its pictures; returns the text.

    Args:
        results: JSON Lines files; None means those of both suites in examples/benchmarks/results.
        notes: the hand-written parts; None means docs/results_notes.md with the results that it speaks of, which are
            those of `results` None, and no such parts with others.
        output: None means RESULTS.md.
        figures: folder of the pictures; None means docs/results beside `output`.

    Raises:
        ValueError: no results, or a line of them, or the notes, can't be used.
    """
    files = RESULTS if results is None else results
    output = output or ROOT / "RESULTS.md"
    figures = figures or output.parent / "docs" / "results"
    link = os.path.relpath(figures, output.parent).replace(os.sep, "/")
    if notes is None and results is None:
        prose = {name: rebased(text, ROOT, output.parent) for name, text in read_notes(NOTES).items()}
    else:
        prose = read_notes(notes)
    text = document(read_records(files), prose, figures, link)
    with atomic_write(output) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{output} and {len(list(figures.glob('*.png')))} pictures in {figures}")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        help="JSON Lines files (default: both suites' in examples/benchmarks/results)",
    )
    parser.add_argument(
        "--notes", type=Path, help="hand-written parts (default: docs/results_notes.md, but of --results none)"
    )
    parser.add_argument("--output", type=Path, help="default: RESULTS.md")
    parser.add_argument("--figures", type=Path, help="folder of its pictures (default: docs/results beside --output)")
    try:
        main(**vars(parser.parse_args()))
    except ValueError as error:
        sys.exit(f"error: {error}")
