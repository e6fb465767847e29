"""From LLaDA-8B and the data to the tables of the paper (arXiv 2605.29716): every method, three seeds.

What would be run, without running it; then all of it, which takes many GPU days; then a part of it:
    python train_scripts/paper_tables.py --dry_run
    python train_scripts/paper_tables.py --confirm_run_unsafe_code
    python train_scripts/paper_tables.py --domains math --methods lora nara --seeds 42
Each run on eight GPUs; it is one, if nothing is said:
    python train_scripts/paper_tables.py --confirm_run_unsafe_code --launch_arguments "--multi_gpu --num_processes 8"

For each domain, method and seed it trains with train_scripts/dllm.py, evaluates with nara-eval, and writes the tables
that can be made from what is in OUTPUT_DIR, of earlier calls too, to OUTPUT_DIR/tables.md. Stopped, it goes on where
it was when called again: what is done isn't repeated, a training continues from its last checkpoint, and an evaluation
with the next question. A folder holds the runs of one model, precision and set of arguments: what a run was made with
stands beside it, and a call with other settings is refused. Data that are missing are downloaded to --data_dir.

Several machines can share the work, each called with other seeds or methods and the same output folder. The base is
evaluated by the first call that comes to it, for all seeds; machines that begin together would each do it, so leave it
out of --methods on all but one.

The code domain runs programs that the model writes, so it needs --confirm_run_unsafe_code.

Needs the extras train and eval: pip install -e '.[train,eval]'
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from nara_diffusion.harness.download import download
from nara_diffusion.harness.paper.launching import with_processes
from nara_diffusion.harness.paper.plan import BASE, DOMAINS, EVALUATION, METHODS, TRAINING, Plan, Run, Step
from nara_diffusion.harness.paper.settings import check, keep
from nara_diffusion.harness.paper.shared import write_shared
from nara_diffusion.harness.paper.tables import document
from nara_diffusion.training.adapters.methods import METHODS as ADAPTERS
from nara_diffusion.training.arguments.cli import option, parse_arguments

HERE = Path(__file__).parent
TEXTS = ("--launch_arguments", "--train_arguments", "--evaluation_arguments")


@dataclass
class PaperArguments:
    """What to run"""

    output_dir: str = option(
        "outputs/paper", "Folder of all runs and of tables.md; of one model and one set of arguments."
    )
    data_dir: str = option("data", "Folder of the data; what is missing is downloaded to it.")
    domains: list[str] = option(list(DOMAINS), "Tables to make.", choices=tuple(DOMAINS))
    methods: list[str] = option(
        list(METHODS), "Rows of the tables: base, or a value of dllm.py's --adapter.", choices=(BASE, *ADAPTERS)
    )
    seeds: list[int] = option([42, 43, 44], "Of training; base is evaluated once, for all.")
    model: str = option("llada_instruct", "Configurations to use.", choices=("llada_instruct", "llada_base", "dream"))
    pretrained_model_name_or_path: str | None = option(None, "Model in place of the one that they name.")
    with_math: bool = option(False, "Ask MATH too in the math domain; needs pip install 'lm-eval[math]'.")
    dtype: str = option("bfloat16", "Precision of evaluation.", choices=("bfloat16", "float16", "float32"))
    batch_size: int = option(16, "Questions that are answered at once.", unit="questions")
    launch_arguments: str = option(
        "",
        "Further arguments of accelerate launch, as one text: '--num_processes 8'; without a number it is one process.",
    )
    train_arguments: str = option("", "Further arguments of every training, as one text: '--logging_steps 5'.")
    method_arguments: list[str] = option(
        [], "Those of one method: 'lora: --learning_rate 2e-4', one text a method.", sentences=True
    )
    evaluation_arguments: str = option("", "Further arguments of every nara-eval, as one text: '--limit=100'.")
    confirm_run_unsafe_code: bool = option(False, "Run the programs that the model writes, which the code table needs.")
    keep_going: bool = option(False, "Go on with the other runs after one has failed.")
    dry_run: bool = option(False, "Show the commands that are left to run, and nothing else.")

    def __post_init__(self) -> None:
        for name in ("domains", "methods", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, expected one or more, each once.")
        unsafe = [domain for domain in self.domains if DOMAINS[domain].runs_code]
        if unsafe and not self.confirm_run_unsafe_code and not self.dry_run:
            raise ValueError(
                f"the table {unsafe[0]} runs programs that the model writes: add --confirm_run_unsafe_code (best in a "
                "container), or leave it out of --domains."
            )
        for text in self.method_arguments:
            if text.partition(":")[0].strip() not in ADAPTERS:
                raise ValueError(f"method_arguments has {text!r}, expected 'METHOD: --flag value …' with a method.")


def main(args: PaperArguments) -> None:
    """Runs what is left to run, and writes the tables after each evaluation.

    Raises:
        ValueError: the output folder holds runs that were made with other settings.
    """
    plan = plan_of(args)
    check(plan, args.domains, args.methods)
    left = [step for run in runs_of(plan, args) for step in plan.steps(*run) if not step.is_done()]
    print(f"{len(left)} steps are left to do in {args.output_dir}")
    if args.dry_run:
        show(plan, args, left)
        return
    fetch(plan, args.domains)
    failed: list[str] = []
    for run in runs_of(plan, args):
        for step in plan.steps(*run):
            if step.is_done():
                continue
            keep(plan, run)
            if not perform(step):
                failed.append(step.title)
                break
        write_tables(plan, args)
        if failed and not args.keep_going:
            break
    if failed:
        sys.exit("failed: " + "; ".join(failed) + ". What is done is kept: mend the cause, and call this again.")
    print((plan.output_dir / "tables.md").read_text(encoding="utf-8"))


def runs_of(plan: Plan, args: PaperArguments) -> Iterator[Run]:
    """The runs of this call, each looked for when its turn comes: another machine may have evaluated the base."""
    for seed in args.seeds:  # a whole table with one seed first
        for domain in args.domains:
            for method in args.methods:
                if method != BASE:
                    yield domain, method, seed
                elif seed == args.seeds[0]:
                    yield plan.base_run(domain, seed)


def plan_of(args: PaperArguments) -> Plan:
    """The commands' common part.

    Raises:
        ValueError: there is no configuration of a domain for this model, or launch_arguments leave the number of
            processes open.
    """
    launch, processes = with_processes(shlex.split(args.launch_arguments))
    named = (text.partition(":") for text in args.method_arguments)
    plan = Plan(
        output_dir=Path(args.output_dir),
        data_dir=Path(args.data_dir),
        script=HERE / "dllm.py",
        configs=HERE / "configs",
        model=args.model,
        pretrained=args.pretrained_model_name_or_path,
        dtype=args.dtype,
        batch_size=args.batch_size,
        with_math=args.with_math,
        launch=launch,
        processes=processes,
        training=tuple(shlex.split(args.train_arguments)),
        evaluation=tuple(shlex.split(args.evaluation_arguments)),
        methods={name.strip(): tuple(shlex.split(flags)) for name, _, flags in named},
    )
    for domain in args.domains:
        if not plan.config(domain).is_file():
            raise ValueError(f"there is no {plan.config(domain)}: leave {domain} out of --domains, or write it")
    return plan


def joined(argv: Sequence[str]) -> list[str]:
    """`argv` with each text of further arguments as --flag=TEXT: argparse takes a text of one word that begins with
    dashes for a flag. One of this script's own flags is left as it is: there the text was forgotten."""
    own = {"-h", "--help", "--config"} | {
        f"--{no}{field.name}" for field in fields(PaperArguments) for no in ("", "no-")
    }
    result: list[str] = []
    for word in argv:
        if result and result[-1] in TEXTS and word.startswith("-") and word.partition("=")[0] not in own:
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def show(plan: Plan, args: PaperArguments, steps: list[Step]) -> None:
    """Print what would be fetched and run."""
    for domain in args.domains:
        for path, source in plan.files(domain).items():
            if not path.is_file():
                print(f"\n# fetch {source}\n#    to {path}")
    for step in steps:
        print(f"\n# {step.title}\n{shlex.join(step.command)}")


def fetch(plan: Plan, domains: list[str]) -> None:
    """Downloads the data that are missing."""
    for domain in domains:
        for path, source in plan.files(domain).items():
            if not path.is_file():
                print(f"fetching {source}")
                download(source, path)


def perform(step: Step) -> bool:
    """Runs a step; returns whether its result is there."""
    begins = step.folder.name == TRAINING and not any(step.folder.glob("checkpoint-*"))
    if begins:  # what a run left that was stopped before its first checkpoint, and what was made of such a one
        shutil.rmtree(step.folder, ignore_errors=True)
        shutil.rmtree(step.folder.with_name(EVALUATION), ignore_errors=True)
    print(f"\n== {step.title}\n{shlex.join(step.command)}", flush=True)
    status = subprocess.run(step.command, check=False).returncode
    if status:
        print(f"!! {step.title}: ended with status {status}", flush=True)
    return status == 0 and step.is_done()


def write_tables(plan: Plan, args: PaperArguments) -> None:
    """OUTPUT_DIR/tables.md, from all evaluations that are there, of whatever call.

    Raises:
        ValueError: another machine has added runs that were made with other settings.
    """
    check(plan, args.domains, args.methods)
    write_shared(plan.output_dir / "tables.md", document(plan))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(parse_arguments(PaperArguments, joined(sys.argv[1:]), description=__doc__))
    except ValueError as error:
        sys.exit(f"paper_tables.py: {error}")
