"""From LLaDA-8B to the tables of the paper (arXiv 2605.29716): trains, evaluates, prints; many GPU days in all.

What would be run; a part of it; all of it, each run on eight GPUs:
    python examples/paper_tables.py --dry_run
    python examples/paper_tables.py --domains math --methods lora nara --seeds 42
    python examples/paper_tables.py --confirm_run_unsafe_code --launch_arguments "--multi_gpu --num_processes 8"

For each domain, method and seed it calls train_scripts/dllm.py with the domain's configuration, whose head says which
data to download, and then nara-eval on the paper's test sets. Called again, it goes on where it was: finished runs
aren't repeated, a training continues from its last checkpoint, an evaluation with the next question. A folder is for
one model and one set of further arguments. A table has all runs of the folder, in percent with mean ± standard
deviation over seeds, and the difference from LoRA with its 95 % interval, paired over seeds.

Needs the extras train and eval: pip install -e '.[train,eval]'
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from mean_interval import interval

SCRIPTS = Path(__file__).parents[1] / "train_scripts"
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")

CONFIGS = {"math": "math14k", "commonsense": "commonsense170k", "code": "code_feedback"}
"""{domain: the end of its configuration's name}"""
MATH = ("addsub", "aqua", "gsm8k", "multiarith", "svamp", "singleeq")
COMMONSENSE = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "siqa", "winogrande")
TASKS = {
    "math": [f"llm_adapters_{name}" for name in MATH],
    "commonsense": [f"llm_adapters_{name}" for name in COMMONSENSE],
    "code": ["humaneval_instruct", "mbpp_instruct"],
}
"""{domain: tasks of nara-eval, the columns of its table}"""
METRICS = ("acc,none", "pass@1,create_test", "pass_at_1,extract_code")  # what lm-eval calls a score, and its filter
PAPER = "gen_length=512,steps=32,block_length=16"  # the sampler's settings, which the other tasks' files have
METHODS = ("base", "prompt_tuning", "p_tuning", "lora", "hira", "multi_lora", "nara_c", "nara", "dora", "nara_dora")
"""The rows: base, the model without training, or a value of dllm.py's --adapter."""

Run = tuple[str, str, int]
"""A run: (domain, method, seed)."""
Scores = dict[int, dict[str, float]]
"""{seed: {column: percent}} of a method."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/paper"), help="folder of all runs")
    parser.add_argument("--model", default="llada_instruct", help="llada_instruct, llada_base or dream")
    parser.add_argument("--pretrained_model_name_or_path", help="in place of the configuration's")
    parser.add_argument("--domains", nargs="+", default=list(TASKS), choices=list(TASKS), help="tables to make")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="rows to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], help="of training; base has none")
    for name, of in (("launch", "accelerate launch"), ("train", "each training"), ("evaluation", "each nara-eval")):
        default = "--num_processes 1" if name == "launch" else ""
        parser.add_argument(f"--{name}_arguments", default=default, help=f"further arguments of {of}, as one text")
    parser.add_argument("--confirm_run_unsafe_code", action="store_true", help="run programs that the model writes")
    parser.add_argument("--dry_run", action="store_true", help="show the commands that are left, and nothing else")
    args = parser.parse_args(argv)
    if "code" in args.domains and not (args.confirm_run_unsafe_code or args.dry_run):
        parser.error("the table code runs programs that the model writes: add --confirm_run_unsafe_code")
    for domain in args.domains:
        if not config_of(args, domain).is_file():
            parser.error(f"there is no {config_of(args, domain)}: leave {domain} out of --domains, or write it")
    return args


def config_of(args: argparse.Namespace, domain: str) -> Path:
    return SCRIPTS / "configs" / f"{args.model}_{CONFIGS[domain]}.yaml"


def commands(args: argparse.Namespace, run: Run) -> Iterator[list[str]]:
    """The commands that are left of a run: of training, unless it is the base, and of evaluation."""
    domain, method, seed = run
    folder = args.output_dir / domain / method / f"seed-{seed}"
    training, evaluation = folder / "training", folder / "evaluation"
    config = config_of(args, domain)
    named = yaml.safe_load(config.read_text(encoding="utf-8"))["pretrained_model_name_or_path"]
    model = {"pretrained": args.pretrained_model_name_or_path or named, "dtype": "bfloat16"}
    launch = [*LAUNCH, *shlex.split(args.launch_arguments)]
    if method != "base":
        model["peft"] = str(training)
        if not (training / "results.json").is_file():
            yield [
                *(*launch, str(SCRIPTS / "dllm.py"), "--config", str(config), "--test_file", "none"),
                *("--test_samples", "8"),  # of the validation's: nara-eval measures, these show that answers come
                *("--pretrained_model_name_or_path", model["pretrained"], "--adapter", method, "--seed", str(seed)),
                *("--output_dir", str(training), *shlex.split(args.train_arguments)),
                *(["--resume_from_checkpoint", "latest"] if any(training.glob("checkpoint-*")) else []),
            ]
    if evaluated(evaluation, domain) is None:
        yield [
            *(*launch, "-m", "nara_diffusion.lm_eval", "run", "--model", "nara_dllm"),
            *("--model_args", json.dumps(model), "--tasks", ",".join(TASKS[domain])),
            *("--apply_chat_template", "--batch_size", "16", "--output_path", str(evaluation)),
            *("--use_cache", str(evaluation / "answers")),  # answers that a stopped evaluation has
            *(["--confirm_run_unsafe_code", "--gen_kwargs", PAPER] if domain == "code" else []),
            *shlex.split(args.evaluation_arguments),
        ]


def evaluated(folder: Path, domain: str) -> dict[str, Any] | None:
    """nara-eval's results in `folder` with a score of each set of the domain; None if there are none."""
    for path in sorted(folder.glob("**/results_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if set(TASKS[domain]) <= content["results"].keys():
            return content
    return None


def document(output_dir: Path) -> str:
    """The tables of all evaluations in the output folder, in Markdown."""
    parts = []
    for domain, tasks in TASKS.items():
        scores: dict[str, Scores] = {}
        limited: dict[str, None] = {}
        for method, folder in ((m, f) for m in METHODS for f in sorted((output_dir / domain / m).glob("seed-*"))):
            if evaluation := evaluated(folder / "evaluation", domain):
                scores.setdefault(method, {})[int(folder.name.removeprefix("seed-"))] = percents(evaluation, tasks)
                limited |= dict.fromkeys(limits(evaluation, tasks))
        if scores:
            warning = f"**Not the paper's figures: asked were only {', '.join(limited)}.**\n\n" if limited else ""
            parts.append(f"## {domain}\n\n{warning}{table(scores)}\n")
    return "\n".join(parts)


def percents(found: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """{column: percent} of nara-eval's results, with the average over the tasks."""
    results = [found["results"][task] for task in tasks]
    values = [100 * next(float(result[metric]) for metric in METRICS if metric in result) for result in results]
    columns = [task.removeprefix("llm_adapters_").removesuffix("_instruct") for task in tasks]
    return {**dict(zip(columns, values, strict=True)), "average": fmean(values)}


def limits(found: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """The tasks of which not all questions were asked, in words."""
    counts = [(task, n) for task, n in found.get("n-samples", {}).items() if task in tasks]
    return [f"{n['effective']} of {n['original']} of {task}" for task, n in counts if n["effective"] < n["original"]]


def table(scores: Mapping[str, Scores]) -> str:
    """A row for each method; the difference is that of the averages, over the seeds that LoRA has too."""
    columns = next(row for by_seed in scores.values() for row in by_seed.values())
    lines = [f"| method | seeds | {' | '.join(columns)} | against lora |", "|---" * (len(columns) + 3) + "|"]
    reference = scores.get("lora", {})
    for method, by_seed in scores.items():
        cells = [cell([row[column] for row in by_seed.values()], "{:.2f}", " ± {1:.2f}") for column in columns]
        common = [] if method in ("base", "lora") else sorted(by_seed.keys() & reference.keys())
        differences = [by_seed[seed]["average"] - reference[seed]["average"] for seed in common]
        cells.append(cell(differences, "{:+.2f}", " ({2:+.2f} to {3:+.2f})"))
        lines.append(f"| {method} | {len(by_seed)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float], mean: str, spread: str) -> str:
    """The mean of the values, and their spread from two on: {0} mean, {1} deviation, {2} to {3} the interval."""
    if not values:
        return ""
    mean_interval = interval(values)
    return mean.format(*mean_interval) + ("" if math.isnan(mean_interval.std) else spread.format(*mean_interval))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is left to run, one seed of everything first, and print the tables."""
    args = parse_arguments(argv)
    if args.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the metric of lm-eval's code tasks
    runs = ((domain, method, seed) for seed in args.seeds for domain in args.domains for method in args.methods)
    for run in dict.fromkeys((domain, method, 0 if method == "base" else seed) for domain, method, seed in runs):
        for command in commands(args, run):
            print(f"\n{shlex.join(command)}", flush=True)
            if not args.dry_run and subprocess.run(command, check=False).returncode:
                sys.exit("that command failed: mend the cause, and call this again. What is done is kept.")
    if not args.dry_run:
        print(f"\n{document(args.output_dir)}")


if __name__ == "__main__":
    main()
