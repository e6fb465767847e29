"""Is noise-awareness worth it? One command runs methods × seeds × tasks on the models that come with the project.

    python examples/benchmarks/benchmark_quality.py --dry_run                      # what there is to run
    python examples/benchmarks/benchmark_quality.py                                # text: tuning, then five seeds
    python examples/benchmarks/benchmark_quality.py --modality images
    python examples/benchmarks/benchmark_quality.py --stages tune single ablation  # the other methods, NaRA's settings
    python examples/benchmarks/benchmark_quality.py --methods lora nara --domains code --seeds 0 --untuned

Stages, each for the chosen backbones and domains:

    tune      every method tries equally many learning rates, on a seed and on questions that nothing else uses
    main      every method on every seed, with the rates that tuning found; for each that knows λ, the controls too:
              trained with λ held at 0.5 ("constant"), trained with another sample's λ ("shuffled"), and the
              trained one evaluated with its mean C(λ) ("mean_core") and with 1 − λ ("reversed")
    single    the other methods on one seed
    ablation  NaRA, NaRA-Knots and LoRA with other settings, on one domain and three seeds
    cost      a step of each method and one of LoRA in turn: time, memory, parameters; with nothing else running

All methods of a seed see the same questions in the same order, under the same masks (images: the same noise). A run
takes about half a minute of one core; --dry_run counts them. Each run becomes one line of --output (with controls: a
line each), which is on the disk before the next begins: stop whenever you like, and give the same command again.
Several processes may share the work, each with its own --shard k/N; let one of them tune first. Then
examples/benchmarks/report_quality.py writes the report from these lines alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from quality import results
from quality.jobs import SEEDS, STAGES, Job, finished, shard
from quality.planning import Selection, jobs_of
from quality.report.packing import is_packed
from quality.running import run_jobs
from quality.suites import MUST, Suite, load_suite
from quality.variants import VARIANTS


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--modality", choices=("text", "images"), default="text", help="the suite (default: text)")
    what.add_argument(
        "--stages", nargs="+", choices=STAGES, help="one after another (default: tune main, with --untuned main)"
    )
    what.add_argument("--backbones", nargs="+", help="default: all of the suite")
    what.add_argument("--domains", nargs="+", help="domains of questions, or subjects of images (default: all)")
    what.add_argument("--methods", nargs="+", help=f"of tune, main and ablation (default: {' '.join(MUST)})")
    what.add_argument("--others", nargs="+", help="of single, and of tune where that stage is asked for as well")
    what.add_argument(
        "--tune_domains",
        nargs="+",
        help="where learning rates are tried (default: text commonsense, images a subject of its own)",
    )
    what.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 0 to 4")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of every run: steps=400 rank=4 (text: a field of quality/text/recipe.py, or an argument of the "
        "adapter; images: an argument of train_scripts/dreambooth_sdxl.py)",
    )
    how.add_argument("--untuned", action="store_true", help="take each method's first trial instead of the tuned rates")
    how.add_argument("--output", type=Path, help="the results file (default: outputs/quality/MODALITY.jsonl)")
    how.add_argument("--shard", default="0/1", help="do every N-th run, k/N: one process each (default: 0/1)")
    how.add_argument("--dry_run", action="store_true", help="list what is left to run, and end")
    args = parser.parse_args(argv)
    if args.untuned and "tune" in (args.stages or ()):
        parser.error("--untuned takes no learning rates from tuning, but --stages has tune: leave out one of them")
    args.stages = args.stages or (["main"] if args.untuned else ["tune", "main"])
    return args


def select(suite: Suite, args: argparse.Namespace) -> Selection:
    """What the arguments ask for of `suite`.

    Raises:
        ValueError: a name that it doesn't have.
    """
    known = tuple(dict.fromkeys((*suite.methods, *VARIANTS)))
    _check("backbones", args.backbones, suite.backbones)
    _check("methods", args.methods, known)
    _check("others", args.others, known)
    _check("domains", args.domains, suite.domains)
    _check("tune_domains", args.tune_domains, tuple(dict.fromkeys((*suite.tune_domains, *suite.domains))))
    asked_others = args.others or suite.others
    return Selection(
        backbones=args.backbones or suite.backbones,
        domains=args.domains or suite.domains,
        methods=args.methods or MUST,
        others=asked_others if "single" in args.stages else (),
        tune_domains=args.tune_domains or suite.tune_domains,
        seeds=args.seeds,
        settings=parse_settings(args.set),
    )


def _check(name: str, given: list[str] | None, known: tuple[str, ...]) -> None:
    unknown = sorted(set(given or ()) - set(known))
    if unknown:
        raise ValueError(f"--{name} has {', '.join(unknown)}, expected of {', '.join(known)}")


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """["steps=400"] → {"steps": 400}; values are read as YAML.

    Raises:
        ValueError: one isn't NAME=VALUE.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--set has {text!r}, expected NAME=VALUE")
        settings[name] = yaml.safe_load(value)
    return settings


def main(argv: list[str] | None = None) -> int:
    """Runs what is left to run; returns the exit status."""
    args = parse_arguments(argv)
    suite = load_suite(args.modality)
    path = args.output or Path("outputs/quality") / f"{args.modality}.jsonl"
    if is_packed(results.read(path)):
        raise ValueError(f"{path} holds packed results: choose another --output, and pack it when it is whole.")
    selection = select(suite, args)
    stages = {stage: shard(jobs_of(suite, stage, selection), args.shard) for stage in STAGES if stage in args.stages}
    if args.dry_run:
        show(stages, path)
        return 0
    failures = []
    for jobs in stages.values():
        failures += run_jobs(suite, jobs, path, untuned=args.untuned)
    print(f"{len(results.read(path))} records in {path}")
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


def show(stages: dict[str, list[Job]], path: Path) -> None:
    """Prints what is left to run."""
    done = finished(results.read(path))
    for stage, jobs in stages.items():
        left = [job for job in jobs if job.key not in done]
        print(f"{stage}: {len(left)} of {len(jobs)} runs left")
        for job in left:
            print(f"    {job.title} {dict(job.settings) or ''}".rstrip())


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
