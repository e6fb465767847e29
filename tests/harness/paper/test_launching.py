"""How many processes run the paper's experiments, and how further arguments for them are given as one text."""

from __future__ import annotations

import re
import shlex

import pytest

from nara_diffusion.harness.paper.plan import DOMAINS, Step
from nara_diffusion.training.arguments.cli import parse_arguments
from train_scripts import paper_tables
from train_scripts.dllm import Arguments, shipped_run
from train_scripts.paper_tables import PaperArguments, joined, main

# processes


def launched(step: Step) -> str:
    """What stands between `accelerate launch` and the program."""
    words = list(step.command[3:])
    programs = [i for i, word in enumerate(words) if word == "-m" or word.endswith("dllm.py")]
    return shlex.join(words[: programs[0]])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--num_processes 1"),
        ("--mixed_precision no", "--mixed_precision no --num_processes 1"),
        ("--cpu --num_processes 4", "--cpu --num_processes 4"),
        ("--multi_gpu --num_processes=8", "--multi_gpu --num_processes=8"),
        ("--num-processes 2 --config-file x.yaml", "--num-processes 2 --config-file x.yaml"),
    ],
)
def test_one_process_runs_unless_another_number_is_named(arguments, given: str, expected: str) -> None:
    for step in paper_tables.plan_of(arguments(launch_arguments=given)).steps("math", "nara", 3):
        assert launched(step) == expected
        assert "--gradient_accumulation_steps" not in step.command


@pytest.mark.parametrize("model", ["llada_instruct", "llada_base", "dream"])
def test_a_step_has_as_many_samples_on_any_number_of_processes(arguments, model: str) -> None:
    domains = ["math"] if model == "dream" else list(DOMAINS)
    plan = paper_tables.plan_of(
        arguments(model=model, domains=domains, launch_arguments="--num_processes 8", confirm_run_unsafe_code=True)
    )
    for domain in domains:
        step, _ = plan.steps(domain, "nara", 3)
        parsed = parse_arguments(Arguments, step.command[step.command.index("--config") :], stand_in=shipped_run)
        assert (parsed.global_batch_size, parsed.gradient_accumulation_steps) == (32, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--num_processes 3",
            "num_processes is 3, and llada_instruct_math14k.yaml has steps of 32 samples, 1 a forward, which 1, 2, 4, "
            "8, 16 or 32 processes can share evenly",
        ),
        ("--num_processes 64", "num_processes is 64, and "),
        ("--num_processes many", "launch_arguments has --num_processes 'many', expected a whole number, 1 at least"),
        ("--num_processes", "launch_arguments has --num_processes '', expected a whole number"),
        ("--num_processes=0", "launch_arguments has --num_processes '0', expected a whole number"),
        ("--multi_gpu", "launch_arguments has --multi_gpu and no --num_processes N: add it"),
        ("--config-file=some.yaml", "launch_arguments has --config_file and no --num_processes N: add it"),
        ("--use_fsdp --fsdp_version 2", "launch_arguments has --use_fsdp and no --num_processes N: add it"),
    ],
)
def test_a_number_of_processes_that_fits_no_step_is_refused_before_anything_runs(
    arguments, performed: list[Step], given: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        main(arguments(launch_arguments=given))
    assert not performed


@pytest.mark.parametrize("own", ["--global_batch_size 6", "--global_batch_size=6", "--train_batch_size 2"])
def test_a_batch_of_ones_own_is_left_to_the_training(arguments, own: str) -> None:
    for how in ({"train_arguments": own}, {"method_arguments": [f"nara: {own}"]}):
        plan = paper_tables.plan_of(arguments(launch_arguments="--num_processes 3", **how))
        step, _ = plan.steps("math", "nara", 3)
        assert shlex.join(step.command).endswith(own)
    with pytest.raises(ValueError, match="num_processes is 3"):
        plan.steps("math", "lora", 3)


# arguments as one text


@pytest.mark.parametrize("name", ["launch_arguments", "train_arguments", "evaluation_arguments"])
@pytest.mark.parametrize("text", ["--multi_gpu", "--limit=4", "--multi_gpu --num_processes 8", "-x", "none of it", ""])
def test_a_text_that_begins_with_dashes_is_one_argument(name: str, text: str) -> None:
    for flags in ([f"--{name}", text], [f"--{name}={text}"]):
        args = parse_arguments(PaperArguments, joined(["--dry_run", *flags, "--seeds", "7"]))
        assert (getattr(args, name), args.dry_run, args.seeds) == (text, True, [7])


def test_a_text_that_was_forgotten_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--launch_arguments", "--dry_run"], ["--launch_arguments", "--seeds=7"], ["--launch_arguments"]):
        with pytest.raises(SystemExit):
            parse_arguments(PaperArguments, joined(flags))
        assert "--launch_arguments: expected one argument" in capsys.readouterr().err
