"""Is nara-check right where the answer is known? Runs it on the regimes of docs/results/regimes_plan.md.

    python examples/benchmarks/benchmark_check.py --dry_run        # the rows that are left
    python examples/benchmarks/benchmark_check.py                  # each two to eight minutes of a core
    python examples/benchmarks/benchmark_check.py --rows eps_to_v subject --seeds 1
    python examples/benchmarks/benchmark_check.py --report         # verdicts beside what was found, as Markdown

A row is a regime and what is adapted in it, "eps_to_v" or "eps_to_v:all". Trials, rules and defaults are nara-check's
own: short trainings of 100 steps at rank 4 and the rate 1e-2, of the core 2.5e-3 (1e-3 in text), in three to six
repeats; data, loss and held-out samples are the regime's. What is known is from the confirmation seeds in --known,
after 200 steps at each method's best rate. Each row becomes one line of --output; give the same command again to go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quality import results
from quality.regimes.checked import ROWS, check_row, check_table, left_rows
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent / "results"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the check (default: 0)")
    parser.add_argument("--output", type=Path, default=RESULTS / "check.jsonl", help="default: %(default)s")
    parser.add_argument("--known", type=Path, default=RESULTS / "regimes.jsonl", help="default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="say what is left to run, and end")
    parser.add_argument("--report", action="store_true", help="print the table, and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    args = parse_arguments(argv)
    records = results.read(args.output)
    if args.report:
        print(check_table(records, results.read(args.known)))
        return 0
    left = left_rows(args.rows, args.seeds, records)
    if args.dry_run:
        print(*(f"{row}, seed {seed}" for row, seed in left), f"{len(left)} left", sep="\n")
        return 0
    for row, seed in tqdm(left, unit="row"):
        results.append(args.output, [check_row(row, seed)])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; give the same command again to go on")
