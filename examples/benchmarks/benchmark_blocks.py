"""What is λ worth to an adapter of DiffusionGemma? Trains gemma-tiny by the arms of blocks.yaml.

    python examples/benchmarks/benchmark_blocks.py --stage dev --output blocks.jsonl      # rates, development seeds
    python examples/benchmarks/benchmark_blocks.py --stage confirm --output blocks.jsonl  # the best ones, fresh seeds
    python examples/benchmarks/benchmark_blocks.py --report --output blocks.jsonl
    python examples/benchmarks/benchmark_blocks.py --make_base 64 --base gemma-64  # a base with a longer canvas
    python examples/benchmarks/benchmark_blocks.py --bayes  # what λ can be worth, without a model

All arms of a seed meet the same questions, noise levels and noise. Scores: held-out loss by bin of λ, of a first and of
a self-conditioned pass, their mean (`score`), and exact match at 4, 8 and 16 steps of transformers' `generate`. Each
run becomes a line of --output: stop whenever you like, and give the same command again. A short run takes 20 seconds
of one core.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from benchmark_record import for_terminal, made_in
from quality import results
from quality.blocks.longer import make_base
from quality.blocks.report import bayes_table, sections
from quality.blocks.runs import Arm, Run, figures_of, held_out_bayes
from quality.regimes.runs import rounded

PLAN = yaml.safe_load((Path(__file__).parent / "blocks.yaml").read_text(encoding="utf-8"))
FIRST = PLAN["tasks"][0]
"""The task on which every rate of a grid is tried."""


def grid_of(title: str) -> list[dict[str, float]]:
    """The combinations of an arm's grid of rates."""
    grid = PLAN["grids"][PLAN["arms"][title]["grid"]]
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def arm_of(title: str) -> Arm:
    return Arm(**{name: value for name, value in PLAN["arms"][title].items() if name not in ("grid", "rates_of")})


def trials(task: str, title: str, records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What an arm tries: its grid on the first task; elsewhere the two best rates there, its own or those of another.

    Raises:
        ValueError: a trial of the first task is missing.
    """
    other = PLAN["arms"][title].get("rates_of")
    if other is None and (task == FIRST or len(grid_of(title)) == 1):
        return grid_of(title)
    return ranked(FIRST, other or title, records)[:2]


def ranked(task: str, title: str, records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The trials of an arm, the lowest score on the development seeds first.

    Raises:
        ValueError: a trial is missing.
    """
    scores = defaultdict(list)
    for record in records:
        if (record["stage"], record["base"], record["task"], record["arm"]) == ("dev", PLAN["base"], task, title):
            value = record["score"]
            scores[tuple(record["rates"].items())].append(float("inf") if value is None else value)
    candidates = [tuple(rates.items()) for rates in trials(task, title, records)]
    missing = [rates for rates in candidates if len(scores[rates]) < len(PLAN["stages"]["dev"])]
    if missing:
        raise ValueError(f"{title} lacks trials of {task} at {dict(missing[0])}: run --stage dev first.")
    return [dict(rates) for rates in sorted(candidates, key=lambda rates: fmean(scores[rates]))]


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(PLAN["stages"]), default="dev")
    parser.add_argument("--tasks", nargs="+", choices=tuple(PLAN["tasks"]), default=tuple(PLAN["tasks"]))
    parser.add_argument("--arms", nargs="+", choices=tuple(PLAN["arms"]), default=tuple(PLAN["arms"]))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the stage")
    parser.add_argument("--length", choices=tuple(PLAN["lengths"]), default="short")
    parser.add_argument("--steps", type=int, help="optimizer steps, in place of those of --length")
    parser.add_argument("--base", default=PLAN["base"], help="of examples/assets, or a folder")
    parser.add_argument("--output", type=Path, default=Path("outputs/blocks.jsonl"))
    parser.add_argument("--report", action="store_true", help="print what the records say, and end")
    parser.add_argument("--make_base", type=int, help="write a base with a canvas of so many positions, and end")
    parser.add_argument("--bayes", action="store_true", help="print what λ is worth by Bayes' rule, and end")
    args = parser.parse_args(argv)
    if args.bayes:
        print(bayes_table())
        with_level, without_level = (held_out_bayes(args.base, is_told) for is_told in (True, False))
        print(f"held-out rows of {args.base}: with λ {with_level:.4f}, without {without_level:.4f}")
        return 0
    if args.make_base:
        print(f"exact match {make_base(args.make_base, Path(args.base)):.3f}")
        return 0
    if args.report:
        print(sections(results.read(args.output)))
        return 0
    made_in(args.stage)  # refuses changes before anything runs
    steps = args.steps or PLAN["lengths"][args.length]
    base = Path(args.base).name
    for seed, task, title in itertools.product(args.seeds or PLAN["stages"][args.stage], args.tasks, args.arms):
        records = results.read(args.output)
        chosen = trials(task, title, records) if args.stage == "dev" else ranked(task, title, records)[:1]
        for rates in chosen:
            key = {"stage": args.stage, "base": base, "task": task, "arm": title, "seed": seed, "rates": rates}
            key |= {"steps": steps}
            if not any(key.items() <= record.items() for record in records):
                run = Run(args.base, task, arm_of(title), seed, rates, steps, PLAN["batch_size"])
                record = made_in(args.stage)
                figures = figures_of(run, samples=args.stage == "confirm")
                results.append(args.output, [{**record, **key, **rounded(figures)}])
    return 0


if __name__ == "__main__":
    sys.exit(for_terminal(main))
