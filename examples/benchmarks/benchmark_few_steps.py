"""Does a core that reads λ pay in four steps, each with its own job? Distils sdxl-tiny by the arms of few_steps.yaml.

    python examples/benchmarks/benchmark_few_steps.py --stage dev --output few.jsonl      # rates, development seeds
    python examples/benchmarks/benchmark_few_steps.py --stage confirm --output few.jsonl  # the best ones, fresh seeds
    python examples/benchmarks/benchmark_few_steps.py --report --output few.jsonl

A run is one of `dreambooth_sdxl.py --distill_to 4`. All arms of a seed meet the same trajectories of the teacher in the
same order. Scores: `validation_loss` (teacher-forced error, as a share of the base's, mean over the steps), `end_error`
(sampled), similarity and alignment of the samples. Each run becomes a line of --output: stop whenever you like, and
give the same command again. A run takes about two minutes of one core.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from benchmark_record import ROOT, for_terminal, provenance
from quality import results
from quality.report.data import change, table

from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.train import main as distil
from nara_diffusion.training.command import gathered
from nara_diffusion.utils.statistics import interval

PLAN = yaml.safe_load((Path(__file__).parent / "few_steps.yaml").read_text(encoding="utf-8"))
CONFIG = ROOT / "train_scripts" / "configs" / "sdxl_tiny_4_steps.yaml"
MEASURES = ("validation_loss_after", "end_error_after", "similarity_after", "text_alignment_after")


def trials(arm: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """The combinations of an arm's grid of rates."""
    grid = PLAN["grids"][arm["grid"]]
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def best_rates(title: str, records: list[dict[str, Any]]) -> dict[str, float]:
    """The rates with the lowest mean score on the development seeds.

    Raises:
        ValueError: a trial is missing.
    """
    scores = defaultdict(list)
    for record in records:
        if record["stage"] == "dev" and record["arm"] == title:
            scores[tuple(record["rates"].items())].append(record["validation_loss_after"])
    wanted = [tuple(rates.items()) for rates in trials(PLAN["arms"][title])]
    missing = [rates for rates in wanted if len(scores[rates]) < len(PLAN["stages"]["dev"])]
    if missing:
        raise ValueError(f"{title} lacks trials at {dict(missing[0])}: run --stage dev first.")
    return dict(min(wanted, key=lambda rates: fmean(scores[rates])))


def run(title: str, seed: int, rates: Mapping[str, float], steps: int) -> dict[str, Any]:
    """Distil by one arm, and return its figures."""
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if str(value).startswith("examples/"):
            settings[name] = str(ROOT / value)
    arm = {name: value for name, value in PLAN["arms"][title].items() if name != "grid"}
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(tempfile.gettempdir()) / "nara-few-steps"  # trajectories serve all arms of a seed
        settings |= {**arm, **rates, "seed": seed, "output_dir": f"{folder}/out", "max_train_steps": steps}
        settings |= {"validation_steps": None, "checkpointing_steps": None}
        settings["distillation_options"] = settings["distillation_options"] | {"trajectories_dir": str(kept)}
        found = distil(DreamBoothArguments(**gathered(DreamBoothArguments, settings)))
    names = (*MEASURES, "curve_after", "trainable_parameters", "seconds", "end_error_before")
    return {name: found[name] for name in names if name in found}


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(PLAN["stages"]), default="dev")
    parser.add_argument("--arms", nargs="+", choices=tuple(PLAN["arms"]), default=tuple(PLAN["arms"]))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the stage")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--output", type=Path, default=Path("outputs/few_steps.jsonl"))
    parser.add_argument("--report", action="store_true", help="print what the records say, and end")
    args = parser.parse_args(argv)
    if args.report:
        print(report([each for each in results.read(args.output) if each["steps"] == args.steps]))
        return 0
    for title in args.arms:
        known = results.read(args.output)
        chosen = list(trials(PLAN["arms"][title])) if args.stage == "dev" else [best_rates(title, known)]
        for seed, rates in itertools.product(args.seeds or PLAN["stages"][args.stage], chosen):
            own = {"stage": args.stage, "arm": title, "seed": seed, "rates": rates, "steps": args.steps}
            if not any(own.items() <= record.items() for record in known):
                figures = run(title, seed, rates, args.steps)
                results.append(args.output, [{**provenance(), **own, **figures}])
    return 0


def report(records: list[dict[str, Any]]) -> str:
    """A row an arm: its means over the fresh seeds, and its paired difference to DoRA r 4."""
    scores: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        if record["stage"] == "confirm":
            scores[record["arm"]][record["seed"]] = record
    rows = []
    for title, own in scores.items():
        other = scores.get("DoRA r 4", {})
        pairs = [own[seed][MEASURES[0]] - other[seed][MEASURES[0]] for seed in own if seed in other]
        difference = change(interval(pairs), 4) if len(pairs) > 1 and title != "DoRA r 4" else "–"
        means = [f"{fmean(record[name] for record in own.values()):.4f}" for name in MEASURES]
        size = next(iter(own.values()))["trainable_parameters"]
        rows.append([title, str(size), str(len(own)), *means, difference])
    return table(
        ["arm", "parameters", "seeds", *(name.removesuffix("_after") for name in MEASURES), "− DoRA r 4"], rows
    )


if __name__ == "__main__":
    sys.exit(for_terminal(main))
