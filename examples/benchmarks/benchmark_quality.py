"""Is noise-awareness worth it? One command runs methods × seeds × tasks on the models that come with the project.

    python examples/benchmarks/benchmark_quality.py --dry_run                      # what there is to run
    python examples/benchmarks/benchmark_quality.py                                # text: five seeds
    python examples/benchmarks/benchmark_quality.py --modality images
    python examples/benchmarks/benchmark_quality.py --modality one_picture --seeds 400 401 402 403 404
    python examples/benchmarks/benchmark_quality.py --methods lora nara --domains code --seeds 0

Every method runs on every seed, with the rates that the committed records found for it; for each that reads λ, the
controls too: trained with λ = 0.5 ("constant"), trained with another sample's λ ("shuffled"), and the trained one
evaluated with its mean C(λ) ("mean_core") and with 1 − λ ("reversed").

All methods of a seed see the same questions in the same order, under the same masks (images: the same noise). A run
takes about half a minute of one core; --dry_run counts them. Each run becomes one line of --output (with controls: a
line each) before the next begins: stop whenever you like, and give the same command again. Several processes may share
the work, each with its own --shard k/N. Then examples/benchmarks/report_quality.py writes
the report from these lines alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from benchmark_record import for_terminal
from quality.running import SEEDS, SUITES, left_of, load_suite, run_jobs


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--modality", choices=SUITES, default="text", help="the suite (default: text)")
    parser.add_argument("--backbones", nargs="+", help="default: all of the suite")
    parser.add_argument("--domains", nargs="+", help="domains of questions, or subjects of images (default: all)")
    parser.add_argument("--methods", nargs="+", help="default: all of the suite")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 0 to 4")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of every run: max_train_steps=400 rank=4; an argument of train_scripts/dllm.py, of images of "
        "train_scripts/dreambooth_sdxl.py",
    )
    parser.add_argument("--output", type=Path, help="the results file (default: outputs/quality/MODALITY.jsonl)")
    parser.add_argument("--shard", default="0/1", help="do every N-th run, k/N: one process each (default: 0/1)")
    parser.add_argument("--dry_run", action="store_true", help="list what is left to run, and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs what is left to run; returns the exit status."""
    args = parse_arguments(argv)
    suite = load_suite(args.modality)
    methods = args.methods or suite.methods
    if unknown := sorted(set(methods) - set(suite.methods)):
        raise ValueError(f"--methods has {', '.join(unknown)}, expected of {', '.join(suite.methods)}.")
    path = args.output or Path("outputs/quality") / f"{args.modality}.jsonl"
    settings = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in args.set)}
    backbones, domains = args.backbones or suite.backbones, args.domains or suite.domains
    first, count = map(int, args.shard.split("/"))
    jobs = list(suite.jobs(backbones, domains, methods, args.seeds, settings))[first::count]
    if args.dry_run:
        left = left_of(jobs, path)
        print(f"{len(left)} of {len(jobs)} runs left", *(f"    {job.title}" for job in left), sep="\n")
        return 0
    failures = run_jobs(suite, jobs, path)
    print(*(f"failed: {failure}" for failure in failures), sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(for_terminal(main))
