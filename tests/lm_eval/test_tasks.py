"""The shipped task files: they load, ask what they should, and score answers that are known to be right or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from nara_diffusion.lm_eval.__main__ import TASKS

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


@pytest.mark.slow
def test_every_set_scores_only_the_right_answer(tmp_path: Path) -> None:
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
