"""docs/evaluation.md: its commands are understood, and its tasks exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import lm_eval
import paper_tables
import pytest
from lm_eval._cli import HarnessCLI

from nara_diffusion.harness.command import TASKS, with_defaults
from nara_diffusion.harness.generation import SETTINGS, read_gen_kwargs
from nara_diffusion.harness.loading import BACKBONE_ARGUMENTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
LM_EVAL = Path(lm_eval.__file__).parent / "tasks"
# Where lm-eval has the tasks that the page names.
FOLDERS = ("arc", "super_glue/boolq", "hellaswag", "openbookqa", "piqa", "siqa", "winogrande", "agieval", "gsm8k")
FOLDERS += ("benchmarks", "humaneval", "mbpp")


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def evaluations() -> list[list[str]]:
    """What nara-eval is given."""
    found = []
    for words in commands():
        if words[0] == "nara-eval":
            found.append(words[1:])
        if "nara_diffusion.harness.command" in words:
            found.append(words[words.index("nara_diffusion.harness.command") + 1 :])
    return found


def names_in(folder: Path) -> set[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.yaml"))
    return set(re.findall(r"^(?:task|group): (\S+)$", text, flags=re.MULTILINE))


def shipped() -> set[str]:
    return names_in(TASKS)


@pytest.fixture(scope="module")
def of_lm_eval() -> set[str]:
    return set().union(*(names_in(LM_EVAL / folder) for folder in FOLDERS))


def test_there_are_commands_for_each_domain() -> None:
    assert len(evaluations()) == 8


@pytest.mark.parametrize("argv", evaluations(), ids=lambda argv: argv[argv.index("--tasks") + 1][:40])
def test_lm_eval_understands_each_command(
    argv: list[str], of_lm_eval: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["nara-eval", *with_defaults(argv)])
    args = HarnessCLI().parse_args()
    assert args.model == "nara_dllm"
    assert {task for text in args.tasks for task in text.split(",")} <= shipped() | of_lm_eval
    assert set(args.model_args) <= {"pretrained", "peft", "dtype", "greedy", *BACKBONE_ARGUMENTS}
    read_gen_kwargs(args.gen_kwargs or {})
    code = any(task.startswith(("nara_humaneval", "nara_mbpp")) for task in args.tasks)
    assert hasattr(args, "confirm_run_unsafe_code") == code


def test_every_shipped_task_is_named_and_every_named_one_exists(of_lm_eval: set[str]) -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert shipped() <= named
    table = [line for line in PAGE.splitlines() if line.startswith(("| ARC", "| AQuA", "| MATH", "| GSM8K", "| SIQA"))]
    assert len(table) == 5
    asked = {name for line in table for name in re.findall(r"`(\w+)`", line)}
    assert asked <= shipped() | of_lm_eval


def test_the_scripts_arguments_are_understood() -> None:
    of_script = [shlex.split(line) for line in str(paper_tables.__doc__).splitlines() if "python examples" in line]
    found = [words[2:] for words in commands() + of_script if words[:2] == ["python", "examples/paper_tables.py"]]
    assert len(found) == 3 + 3
    for argv in found:
        launched = paper_tables.parse_arguments(argv).launch_arguments
        assert launched.endswith("--num_processes 8" if "--launch_arguments" in argv else "--num_processes 1")


def test_nothing_is_said_to_come_from_an_index_that_does_not_have_it() -> None:
    assert "pip install -e '.[eval]'" in PAGE
    assert "pip install -e '.[train,eval]'" in str(paper_tables.__doc__)
    assert [text for text in (PAGE, str(paper_tables.__doc__)) if "nara-diffusion[" in text] == []


def test_every_setting_of_the_sampler_is_named() -> None:
    assert [setting for setting in SETTINGS if f"`{setting}`" not in PAGE] == []
