"""What the alternatives to NaRA reach, as arms: docs/results/alternatives_plan.md says which, and what is compared.

    python examples/benchmarks/benchmark_alternatives.py --stage dev --groups eps_to_v       # rates, on seed 100
    python examples/benchmarks/benchmark_alternatives.py --stage confirm --groups eps_to_v   # seeds 300 to 309

Each run becomes a line of results/alternatives.jsonl before the next begins: stop whenever you like, and give the same
command again. A group is confirmed once the committed plan names it, with the rates that the committed trials choose.
All arms of a seed meet the same data and noise. A run takes half a minute of a core; set OMP_NUM_THREADS=1.
`report_quality.py` makes the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from quality import results
from quality.regimes import alternatives
from quality.regimes.alternatives import DEV
from quality.regimes.plan import CONFIRM
from quality.regimes.runs import record_of


def main(argv: Sequence[str] | None = None) -> int | str:
    """Makes the runs that the records lack; returns what `sys.exit` takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(DEV, CONFIRM), required=True, help="trials of rates, or fresh seeds")
    names = [group.name for group in alternatives.GROUPS]
    parser.add_argument("--groups", nargs="+", choices=names, default=names, help="in the plan's order")
    few = "those of fresh seeds: part of the ten, for a second process"
    parser.add_argument(
        "--seeds", nargs="+", type=int, choices=alternatives.SEEDS, default=alternatives.SEEDS, help=few
    )
    args = parser.parse_args(argv)
    results.provenance()  # the commit at the start
    groups = [group for group in alternatives.GROUPS if group.name in args.groups]
    try:
        alternatives.make_runs(groups, args.stage, args.seeds, partial(record_of, with_mean_core=False))
    except ValueError as error:
        return f"error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
