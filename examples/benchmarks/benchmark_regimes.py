"""Where does knowing λ pay? Runs the regimes of results/regimes_plan.md, and says what is left of them.

    python examples/benchmarks/benchmark_regimes.py --dry_run --output new.jsonl                    # what is left
    python examples/benchmarks/benchmark_regimes.py --regimes eps_to_v --output new.jsonl
    python examples/benchmarks/benchmark_regimes.py --alternatives noise_offset --output new.jsonl
    python examples/benchmarks/benchmark_regimes.py --report                     # what the records say, as Markdown

Regimes, on the sdxl-tiny that comes with the project:

    eps_to_v       an ε-model learns to predict v
    eps_to_flow    … the velocity of a rectified flow
    zero_snr       … v, on a schedule with zero terminal SNR

and on uniform-tiny and llada-tiny:

    blind_open         answers that the prompt leaves open, of a model whose tokens are replaced by random ones
    blind_determined   … that the prompt determines
    seen_open, seen_determined      the same, of a model whose tokens are masked

What is simpler than NaRA there has a plan of its own, results/alternatives_plan.md, whose groups of arms are
--alternatives.

A regime's name stands for the cell that decides it (attention, rank 4, 200 steps); with "_reach" behind it, such as
eps_to_v_reach, for its other cells: other ranks, more steps, all layers.

Ten seeds run, with the rates that development seeds chose and the committed records name. All methods of a seed meet
the same pictures or questions, noise levels and noise. Each run becomes one line of --output before the next begins:
stop whenever you like, and give the same command again. A run takes half a minute of one core or more; set
OMP_NUM_THREADS=1 where other programs run.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from benchmark_record import for_terminal
from quality import results
from quality.regimes import alternatives
from quality.regimes.plan import CONFIRM_SEEDS, NAMES, chosen, make, rated, runs_of
from quality.regimes.report import report
from quality.regimes.runs import ARMS
from quality.running import RESULTS

GROUPS = {group.name: group for group in alternatives.GROUPS}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--regimes", nargs="+", default=NAMES, help=f"of {' '.join(NAMES)}")
    groups_help = f"in place of regimes, groups of results/alternatives_plan.md: {' '.join(GROUPS)}"
    parser.add_argument("--alternatives", nargs="+", choices=GROUPS, metavar="GROUP", help=groups_help)
    parser.add_argument("--methods", nargs="+", choices=tuple(ARMS), help="default: all that the plan has of a regime")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the plan")
    parser.add_argument("--output", type=Path, help="the results file (default: the committed one)")
    parser.add_argument("--dry_run", action="store_true", help="count what is left to run, and end")
    parser.add_argument("--report", action="store_true", help="print what the confirmation seeds say, and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    args = parse_arguments(argv)
    planned = chosen(args.regimes)
    path = args.output or (alternatives.RECORDS if args.alternatives else RESULTS / "regimes.jsonl")
    if args.report:
        records = results.read(path)
        if args.alternatives:
            print(alternatives.report(records), alternatives.rates_table(alternatives.development()), sep="\n\n")
        else:
            print(report(planned, records))
        return 0
    arms = alternatives.rated([GROUPS[name] for name in args.alternatives]) if args.alternatives else rated(planned)
    arms = [(cell, arm, rates) for cell, arm, rates in arms if arm in (args.methods or ARMS)]
    seeds = alternatives.SEEDS if args.alternatives else CONFIRM_SEEDS
    runs = runs_of(arms, results.read(path), args.seeds or seeds)
    for (regime, targets, rank, steps), count in Counter(tuple(vars(run.cell).values()) for run in runs).items():
        print(f"{count} runs of {regime}, {targets}, rank {rank}, {steps} steps")
    if not args.dry_run:
        make(runs, path)
    return 0


if __name__ == "__main__":
    sys.exit(for_terminal(main))
