"""Where does knowing λ pay? Runs the regimes of docs/results/regimes_plan.md, and says what is left of them.

    python examples/benchmarks/benchmark_regimes.py --dry_run                    # what is left, and what it costs
    python examples/benchmarks/benchmark_regimes.py --stages dev                 # rates, on development seeds
    python examples/benchmarks/benchmark_regimes.py --stages dev --regimes eps_to_v --methods lora nara --budget_hours 1
    python examples/benchmarks/benchmark_regimes.py --write_plan                 # the plan's tables, from the records
    python examples/benchmarks/benchmark_regimes.py --stages confirm             # ten fresh seeds, once
    python examples/benchmarks/benchmark_regimes.py --report                     # what they say, as Markdown
    python examples/benchmarks/benchmark_regimes.py --pictures docs/results      # … and as pictures, in minutes

Regimes, on the sdxl-tiny that comes with the project:

    eps_to_v       an ε-model learns to predict v
    eps_to_flow    … the velocity of a rectified flow
    zero_snr       … v, on a schedule with zero terminal SNR
    subject_low    a subject is learnt where λ < 0.5, and the base is to stay elsewhere
    subject_high   a subject is learnt where λ ≥ 0.5, and the base is to stay elsewhere
    two_conditions one subject is learnt where λ < 0.5 and another where λ ≥ 0.5, with the same prompt
    one_image      a subject is learnt from one picture, by many steps
    eps_to_v_diagonal   eps_to_v for MultiAlign's form, which came to it later

and on uniform-tiny and llada-tiny:

    blind_open         answers that the prompt leaves open, of a model whose tokens are replaced by random ones
    blind_determined   … that the prompt determines
    seen_open, seen_determined      the same, of a model whose tokens are masked

A regime's name stands for the cell that decides it (attention, rank 4, 200 steps; of one image rank 16, 400 steps);
with "_reach" behind it, such as eps_to_v_reach, for its other cells: other ranks, more steps, all layers.

Stages: "dev" tries every method's rates on development seeds; "confirm" runs the ten confirmation seeds with the rates
that development chose, and refuses to until the plan's file has those rates and is no draft any more. All methods of a
seed meet the same pictures or questions, noise levels and noise.

Each run becomes one line of --output, with what it was made with, and is on the disk before the next begins: stop
whenever you like, and give the same command again. A run takes half a minute of one core or more; set
OMP_NUM_THREADS=1 where other programs run. --budget_hours counts the core hours of all runs in --output, of earlier
calls too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quality import results
from quality.regimes.cost import left_table
from quality.regimes.methods import ARMS
from quality.regimes.pictures import write_pictures
from quality.regimes.plan import BUDGET_HOURS, CONFIRM, DEV, NAMES, STAGES, chosen
from quality.regimes.plan_file import PLAN_FILE, check_registered, write_plan
from quality.regimes.report import report
from quality.regimes.running import Wish, core_hours, left_of, make, runs_of

OUTPUT = Path(__file__).parent / "results" / "regimes.jsonl"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[DEV], help="one after another (default: dev)")
    parser.add_argument("--regimes", nargs="+", default=NAMES, help=f"default: all, {' '.join(NAMES)}")
    parser.add_argument("--methods", nargs="+", choices=tuple(ARMS), help="default: all that the plan has of a regime")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the plan")
    parser.add_argument(
        "--budget_hours",
        type=float,
        default=BUDGET_HOURS,
        help="begin no run once the runs in --output have taken so many hours of one core (default: %(default)g)",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the results file (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="say what is left to run and what it costs, and end")
    parser.add_argument("--write_plan", action="store_true", help=f"write the tables of {PLAN_FILE.name}, and end")
    parser.add_argument("--report", action="store_true", help="print what the confirmation seeds say, and end")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw what the confirmation seeds say, and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    args = parse_arguments(argv)
    wish = Wish(chosen(args.regimes), args.methods, args.seeds)
    if args.write_plan:
        write_plan(results.read(args.output))
        return 0
    if args.report:
        print(report(wish.planned, results.read(args.output)))
        return 0
    if args.pictures:
        print(*write_pictures(wish.planned, results.read(args.output), args.pictures), sep="\n")
        return 0
    if args.dry_run:
        print(left_table(args.stages, wish, results.read(args.output)))
        return 0
    left = 0
    for stage in args.stages:
        records = results.read(args.output)
        if stage == CONFIRM:
            check_registered(args.regimes, records)
        left += make(left_of(runs_of(stage, wish, records), records), stage, args.output, args.budget_hours)
    print(f"{core_hours(results.read(args.output)):.2f} core hours in {args.output}, {left} runs left")
    return 0


def run(argv: list[str] | None = None) -> int | str:
    """`main` for a terminal: what `sys.exit` takes, an error as one line."""
    try:
        return main(argv)
    except ValueError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return "stopped; give the same command again to go on"


if __name__ == "__main__":
    sys.exit(run())
