"""The shipped task files: they load, ask what they should, and score answers that are known to be right or wrong.
Programs in answers run apart from us, not for longer or larger than they may, and nothing of them is left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from nara_diffusion.lm_eval.__main__ import TASKS
from nara_diffusion.lm_eval.tasks.functions import code_of, run_program

SETS: dict[str, tuple[str, list[tuple[str, Any, str]]]] = {
    "AddSub": ("addsub", [("1 + 1.5?", 2.5, "The answer is 2.5"), ("1 + 1?", 2.0, "3")]),
    "AQuA": (
        "aqua",
        [("(A) 1 (B) 2", "B", "A is wrong. The answer is (B)."), ("(A) 1", "A", "The Answer: C")],
    ),
    "gsm8k": ("gsm8k", [("How much?", 1234, "So $1,234.00 in all"), ("?", 7, "7 or 8")]),
    "MultiArith": ("multiarith", [("?", -3.0, "it is -3"), ("?", 4.0, "")]),
    "SingleEq": ("singleeq", [("?", 0.3333, "0.333333"), ("?", 0.33, "0.34")]),
    "SVAMP": ("svamp", [("?", 5, "5"), ("?", 5, "five")]),
    "ARC-Challenge": ("arc_challenge", [("?", "answer4", "answer4, not answer1"), ("?", "answer1", "4")]),
    "ARC-Easy": ("arc_easy", [("?", "answer5", "Answer5"), ("?", "answer1", "answer2 answer1")]),
    "boolq": ("boolq", [("?", "false", "option1 is False"), ("?", "true", "untrue")]),
    "hellaswag": ("hellaswag", [("?", "ending2", "answer1: ending2"), ("?", "ending3", "ending4")]),
    "openbookqa": ("openbookqa", [("?", "answer2", "answer9, or rather answer2."), ("?", "answer2", "answer22")]),
    "piqa": ("piqa", [("?", "solution1", "solution1"), ("?", "solution1", "solution2")]),
    "social_i_qa": ("siqa", [("?", "answer3", "answer3"), ("?", "answer3", "true")]),
    "winogrande": ("winogrande", [("?", "option2", "option2"), ("?", "option2", "option1")]),
}  # in each, the first answer is right and the second wrong


class Scripted(LM):
    """Gives the answers of a list in turn, or those of a table by question, and remembers what it was asked."""

    def __init__(self, answers: Any) -> None:
        super().__init__()
        self.answers, self.asked = answers, []

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked += [request.args for request in requests]
        if isinstance(self.answers, list):
            return [self.answers[i % len(self.answers)] for i in range(len(requests))]
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def run(model: LM, names: list[Any], manager: TaskManager, **options: Any) -> dict[str, Any]:
    result = simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    assert result is not None
    return result["results"]


def test_every_set_scores_the_right_answer_and_not_the_wrong_one(tmp_path: Path) -> None:
    answers = {}
    for name, (_, rows) in SETS.items():
        (tmp_path / name).mkdir()
        records = [{"instruction": f"{name} {i}: {q}", "input": "", "answer": a} for i, (q, a, _) in enumerate(rows)]
        answers |= {record["instruction"]: row[2] for record, row in zip(records, rows, strict=True)}
        if name == "SVAMP":  # one set is larger, and its other answers are right
            records += [{"instruction": f"more {i}", "input": "of it", "answer": i} for i in range(8)]
            answers |= {f"more {i}\n\nof it": str(i) for i in range(8)}
        (tmp_path / name / "test.json").write_text(json.dumps(records))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(tmp_path)})
    model = Scripted(answers)
    results = run(model, ["llm_adapters_math", "llm_adapters_commonsense"], manager)
    expected = dict.fromkeys((f"llm_adapters_{task}" for task, _ in SETS.values()), 0.5) | {"llm_adapters_svamp": 0.9}
    assert {task: results[task]["acc,none"] for task in expected} == expected
    assert results["llm_adapters_commonsense"]["acc,none"] == 0.5
    assert results["llm_adapters_math"]["acc,none"] == pytest.approx((5 * 0.5 + 0.9) / 6)  # over sets, not questions
    papers = {"gen_length": 512, "steps": 32, "block_length": 16, "until": []}
    assert all(gen_kwargs == papers for _, gen_kwargs in model.asked)


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Sum of numbers."""\n',
    "canonical_solution": "    return sum(numbers)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function that doubles.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2", "assert double('ab') == 'abab'"],
    "test_setup_code": "",
}


def code_task(folder: Path, name: str, rows: list[dict[str, Any]]) -> TaskManager:
    """The shipped task with local data in place of the Hub's."""
    (folder / "rows.json").write_text(json.dumps(rows))
    data = {"dataset_path": "json", "dataset_name": None}
    data |= {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}}}
    changed = {"include": str(TASKS / "code" / f"{name}.yaml"), "task": f"local_{name}", **data}
    (folder / "task.yaml").write_text(yaml.safe_dump(changed))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize(
    ("name", "row", "answers", "expected"),
    [
        (
            "nara_humaneval",
            HUMANEVAL,
            [
                "Sure:\n```python\ndef total(numbers: List[int]) -> int:\n    return sum(numbers)\n```\nIt sums.",
                "```python\ndef total(numbers):\n    return max(numbers)\n```",
                "I can't.",
            ],
            1 / 3,
        ),
        ("nara_humaneval_completion", HUMANEVAL, ["    return sum(numbers)\n", "    return 6\n"], 1 / 2),
        ("nara_mbpp", MBPP, ["```python\ndef double(x):\n    return x + x\n```", "def double(x): return 4"], 1 / 2),
    ],
)
def test_code_is_judged_by_running_it(
    tmp_path: Path, name: str, row: dict[str, Any], answers: list[str], expected: float
) -> None:
    manager = code_task(tmp_path, name, [row] * len(answers))
    model = Scripted(answers)
    results = run(model, [f"local_{name}"], manager, confirm_run_unsafe_code=True)
    assert results[f"local_{name}"]["pass@1,program"] == pytest.approx(expected)
    prompt, gen_kwargs = model.asked[0]
    assert (row.get("prompt") or "assert double('ab') == 'abab'") in prompt
    assert gen_kwargs["gen_length"] == 512


def test_code_is_not_run_unless_that_is_asked_for(tmp_path: Path) -> None:
    model = Scripted([f"open({str(tmp_path / 'ran')!r}, 'w')"])
    with pytest.raises(ValueError, match="marked as unsafe"):
        run(model, ["local_nara_mbpp"], code_task(tmp_path, "nara_mbpp", [MBPP]))
    assert not (tmp_path / "ran").exists()


def test_program_is_the_first_block_that_has_what_is_wanted() -> None:
    text = "Run\n```bash\nls\n```\nthen\n```py\ndef f():\n    return 1\n```\nand\n```\nf()\n```"
    assert code_of(text, r"^def f\b") == "def f():\n    return 1\n"
    assert code_of(text, r"^def g\b") == "ls\n"
    assert code_of("```python\ndef f(): ...", r"^def f\b") == "def f(): ..."
    assert code_of("no block", r"^def f\b") == "no block"


# ---------------------------------------------------------------- programs

SMALL = {"seconds": 60, "memory": 2**30, "file_size": 2**16}
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert sum([1, 2]) == 3", "passed"),
        ("def f():\n    return 1\n\nassert f() == 2, 'f gives 1'", "AssertionError: f gives 1"),
        ("import sys; sys.exit(0)\nassert False", "ended early, with status 0"),
        ("import os; os._exit(0)", "ended early, with status 0"),
        ("import os; os.kill(os.getpid(), 9)", "ended early, with status -9"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import os; assert 'NARA_TEST_SECRET' not in os.environ", "passed"),
        pytest.param("x = bytearray(2**28)", "passed", marks=posix_only),
        pytest.param("x = bytearray(2**31)", "MemoryError", marks=posix_only),
        pytest.param("open('x', 'wb').write(bytes(2**20))", "OSError: [Errno 27] File too large", marks=posix_only),
    ],
)
def test_program_ends_as_it_may(program: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARA_TEST_SECRET", "1")
    assert run_program(program, **SMALL) == reason


def test_program_without_end_is_stopped() -> None:
    assert run_program("while True: pass", seconds=1) == "timed out"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("ending", ["", "import time; time.sleep(600)"])
def test_what_a_program_started_ends_with_it(tmp_path: Path, ending: str) -> None:
    told = tmp_path / "child"
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(told)!r}, "w").write(str(child.pid))
{ending}
"""
    assert run_program(program, seconds=1) == ("timed out" if ending else "passed")
    status = Path(f"/proc/{told.read_text()}/status")
    end = time.monotonic() + 30  # whoever adopted it may take note of its end a little later
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.01)
    assert not status.exists() or "zombie" in status.read_text()
