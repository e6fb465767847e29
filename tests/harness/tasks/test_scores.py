"""The shipped task files: they load, ask what they should, and score answers that are known to be right or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from nara_diffusion.dllm.evaluation.answers import rule_of
from nara_diffusion.harness.command import TASKS
from nara_diffusion.harness.generation import read_gen_kwargs
from nara_diffusion.harness.tasks.code import code_of, humaneval_program
from nara_diffusion.harness.tasks.llm_adapters import load, score_choice, score_letter, score_number

SETS = {
    "AddSub": ("llm_adapters_addsub", [("1 + 1.5?", 2.5, "The answer is 2.5"), ("1 + 1?", "2.0", "3")]),
    "AQuA": ("llm_adapters_aqua", [("(A) 1 (B) 2", ["B"], "A is wrong. The answer is (B)."), ("(A) 1", "A", "C")]),
    "gsm8k": ("llm_adapters_gsm8k", [("How much?", 1234, "So $1,234.00 in all"), ("?", "7", "7 or 8")]),
    "MultiArith": ("llm_adapters_multiarith", [("?", -3.0, "it is -3"), ("?", 4, "")]),
    "SingleEq": ("llm_adapters_singleeq", [("?", 0.3333, "0.333333"), ("?", 0.33, "0.34")]),
    "SVAMP": ("llm_adapters_svamp", [("?", 5, "5"), ("?", 5, "five")]),
    "ARC-Challenge": ("llm_adapters_arc_challenge", [("?", "answer4", "answer4, not answer1"), ("?", "answer1", "4")]),
    "ARC-Easy": ("llm_adapters_arc_easy", [("?", "answer5", "Answer5"), ("?", "answer1", "answer2 answer1")]),
    "boolq": ("llm_adapters_boolq", [("?", "false", "option1 is False"), ("?", "true", "untrue")]),
    "hellaswag": ("llm_adapters_hellaswag", [("?", "ending2", "answer1: ending2"), ("?", "ending3", "ending4")]),
    "openbookqa": ("llm_adapters_openbookqa", [("?", "answer2", "it is answer2."), ("?", "answer2", "answer22")]),
    "piqa": ("llm_adapters_piqa", [("?", "solution1", "solution1"), ("?", "solution1", "solution2")]),
    "social_i_qa": ("llm_adapters_siqa", [("?", "answer3", "answer3"), ("?", "answer3", "true")]),
    "winogrande": ("llm_adapters_winogrande", [("?", "option2", "option2"), ("?", "option2", "option1")]),
}  # in each, the first answer is right and the second wrong


class Scripted(LM):
    """Answers each question by what a table says, and remembers what it was asked."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers, self.asked = answers, []

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def run(model: LM, names: list[str], manager: TaskManager, **options: object) -> dict:
    result = simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    assert result is not None
    return result["results"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm_adapters")
    for name, (_, rows) in SETS.items():
        (folder / name).mkdir()
        records = [
            {"instruction": f"{name} {i}: {question}", "input": "", "output": "", "answer": answer}
            for i, (question, answer, _) in enumerate(rows)
        ]
        (folder / name / "test.json").write_text(json.dumps(records))
    return folder


def test_every_set_scores_the_right_answer_and_not_the_wrong_one(data: Path) -> None:
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data_dir": str(data)})
    answers = {
        f"{name} {i}: {question}": text
        for name, (_, rows) in SETS.items()
        for i, (question, _, text) in enumerate(rows)
    }
    model = Scripted(answers)
    results = run(model, ["llm_adapters_math", "llm_adapters_commonsense"], manager)
    assert {task: results[task]["acc,none"] for task, _ in SETS.values()} == dict.fromkeys(
        (task for task, _ in SETS.values()), 0.5
    )
    assert results["llm_adapters_math"]["acc,none"] == results["llm_adapters_commonsense"]["acc,none"] == 0.5
    papers = {"gen_length": 512, "steps": 32, "block_length": 16, "until": []}
    assert all(gen_kwargs == papers for _, gen_kwargs in model.asked)
    assert dict(read_gen_kwargs(papers).sampling)["temperature"] == 0.0
    assert {prompt for prompt, _ in model.asked} == set(answers)


def test_a_temperature_given_for_a_shipped_task_counts(data: Path) -> None:
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data_dir": str(data)})
    model = Scripted({f"SVAMP {i}: {question}": text for i, (question, _, text) in enumerate(SETS["SVAMP"][1])})
    run(model, ["llm_adapters_svamp"], manager, gen_kwargs="temperature=0.7")
    assert [dict(read_gen_kwargs(asked).sampling)["temperature"] for _, asked in model.asked] == [0.7, 0.7]


def test_no_shipped_task_forbids_sampling() -> None:
    files = [path for path in TASKS.rglob("*.yaml") if "do_sample" in path.read_text(encoding="utf-8")]
    assert files == []


def test_a_group_is_the_mean_over_its_sets_and_not_over_questions(tmp_path: Path, data: Path) -> None:
    for name in SETS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text((data / name / "test.json").read_text())
    records = [{"instruction": f"AddSub {i}", "answer": "1"} for i in range(10)]
    (tmp_path / "AddSub" / "test.json").write_text(json.dumps(records))
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data_dir": str(tmp_path)})
    answers = {f"{name} {i}: {row[0]}": row[2] for name, (_, rows) in SETS.items() for i, row in enumerate(rows)}
    model = Scripted(answers | {f"AddSub {i}": "1" for i in range(10)})
    results = run(model, ["llm_adapters_math"], manager)
    assert results["llm_adapters_math"]["acc,none"] == pytest.approx((1 + 5 * 0.5) / 6)


@pytest.mark.parametrize(
    ("score", "text", "answer", "expected"),
    [
        (score_number, "12 apples and 3", "3", 1),
        (score_number, "10,000", "10000.0", 1),
        (score_number, "none", "0", 0),
        (score_letter, "Answer: (C)", "C", 1),
        (score_letter, "The Answer is Clear", "C", 0),
        (score_letter, "nothing", "A", 0),
        (score_choice, "The correct answer is TRUE", "true", 1),
        (score_choice, "option1 or option2", "option2", 0),
        (score_number, "1234567", "1234568", 0),
        (score_number, "it is 5.0004.", "5", 1),
        (score_choice, "the correct answer is answer2, not answer1", "answer2", 1),
        (score_choice, "answer9, or rather answer2", "answer2", 1),
        (score_choice, "not true but ending1", "ending1", 1),
    ],
)
def test_what_a_text_names(score, text: str, answer: str, expected: int) -> None:
    """And `exact_match` of nara_diffusion.dllm says the same."""
    assert score({"question": "", "answer": answer}, [text]) == {"acc": expected}
    extract = "number" if score is score_number else "choice"
    assert rule_of(extract, [answer])(text, answer).is_right == bool(expected)


def test_an_input_is_the_second_part_of_its_question(tmp_path: Path) -> None:
    (tmp_path / "AddSub").mkdir()
    record = {"instruction": "Add.", "input": "1, 2", "answer": 3}
    (tmp_path / "AddSub" / "test.json").write_text(json.dumps([record]))
    assert load("AddSub", str(tmp_path))["test"][:] == {"question": ["Add.\n\n1, 2"], "answer": ["3"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file .*/AddSub/test.json: put https://raw"),
        ("[{", "is no JSON: line 1"),
        ("[]", "holds no list of records"),
        ('[{"instruction": "x", "answer": "1"}, {"instruction": "y"}]', "record 2 of .* lacks"),
    ],
)
def test_bad_data_is_told(tmp_path: Path, content: str | None, message: str) -> None:
    (tmp_path / "AddSub").mkdir()
    if content is not None:
        (tmp_path / "AddSub" / "test.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load("AddSub", str(tmp_path))


def test_a_set_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "web" / "AddSub"
    source.mkdir(parents=True)
    (source / "test.json").write_text(json.dumps([{"instruction": "x", "answer": "1"}]))
    monkeypatch.setattr("nara_diffusion.harness.tasks.llm_adapters.SOURCE", (tmp_path / "web").as_uri())
    monkeypatch.setattr("nara_diffusion.harness.tasks.llm_adapters.CACHE", tmp_path / "cache")
    assert len(load("AddSub")["test"]) == 1
    (source / "test.json").unlink()
    assert len(load("AddSub")["test"]) == 1
    with pytest.raises(ValueError, match=r"can't be fetched .* fetch it by other means, and put it at"):
        load("SVAMP")
    assert not list((tmp_path / "cache").rglob("*SVAMP*/*"))


# code

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


def code_task(folder: Path, name: str, rows: list[dict]) -> TaskManager:
    """The shipped task with local data in place of the Hub's."""
    (folder / "rows.json").write_text(json.dumps(rows))
    changed = {
        "include": str(TASKS / "code" / f"{name}.yaml"),
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(changed))
    return TaskManager(include_path=str(folder), include_defaults=False)


class Cycling(Scripted):
    """Gives the answers of a list in turn."""

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [self.answers[i % len(self.answers)] for i in range(len(requests))]


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
def test_code_is_judged_by_running_it(tmp_path: Path, name: str, row: dict, answers: list, expected: float) -> None:
    manager = code_task(tmp_path, name, [row] * len(answers))
    model = Cycling(answers)
    results = run(model, [f"local_{name}"], manager, confirm_run_unsafe_code=True)
    assert results[f"local_{name}"]["pass@1,program"] == pytest.approx(expected)
    prompt, gen_kwargs = model.asked[0]
    assert (row.get("prompt") or "assert double('ab') == 'abab'") in prompt
    assert gen_kwargs["gen_length"] == 512


def test_code_is_not_run_unless_that_is_asked_for(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    manager = code_task(tmp_path, "nara_mbpp", [MBPP])
    model = Cycling([f"open({str(marker)!r}, 'w')"])
    with pytest.raises(ValueError, match="marked as unsafe"):
        run(model, ["local_nara_mbpp"], manager)
    assert not model.asked
    assert not marker.exists()


def test_which_block_is_the_program() -> None:
    text = "Run\n```bash\nls\n```\nthen\n```py\ndef f():\n    return 1\n```\nand\n```\nf()\n```"
    assert code_of(text, r"^def f\b") == "def f():\n    return 1\n"
    assert code_of(text, r"^def g\b") == "ls\n"
    assert code_of("```python\ndef f(): ...", r"^def f\b") == "def f(): ..."
    assert code_of("no block", r"^def f\b") == "no block"


def test_a_body_follows_its_header_and_a_function_takes_its_place() -> None:
    body = humaneval_program(HUMANEVAL, "    return sum(numbers)")
    assert body == HUMANEVAL["prompt"] + "    return sum(numbers)"
    whole = humaneval_program(HUMANEVAL, "def total(n):\n    return sum(n)")
    names: dict = {}
    exec(whole, names)
    assert names["total"]([1, 2]) == 3
    assert "List" in names
