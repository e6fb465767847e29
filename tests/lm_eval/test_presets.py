"""Every published column of presets.yaml runs on the shipped models, on local records in the set's columns.

Each task is lm-eval's own file with another `dataset_path`. Lengths are scaled to the models' 64 positions, with as
many blocks; all other settings have to reach `generate` and `log_likelihood` as the preset has them.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml

from nara_diffusion.lm_eval import harness_model
from nara_diffusion.lm_eval.__main__ import PRESETS, main
from nara_diffusion.lm_eval.tasks.functions import run_program

from .conftest import LLADA_TINY

DREAM_TINY = str(Path(LLADA_TINY).with_name("dream-tiny"))
FILES = Path(lm_eval.__file__).parent / "tasks"
CHOICES = {"question": "How many?", "A": "one", "B": "two", "C": "three", "D": "four", "answer": "B"}
CODE = {
    "prompt": "def two():\n",
    "canonical_solution": "    return 2\n",
    "test": "def check(f):\n    assert f() == 2\n",
    "entry_point": "two",
    "task_id": "t/0",
    "text": "Write two().",
    "code": "def two():\n    return 2",
    "test_list": ["assert two() == 2", "assert two() > 1", "assert two() < 3"],
}
ARC = {
    "question": "How many?",
    "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
GPQA = {"Question": "How many?", "Correct Answer": "two"}
GPQA |= {f"Incorrect Answer {i}": word for i, word in enumerate(("one", "three", "four"), 1)}
PROBLEM = [{"question": "How many?", "options": ["one", "two", "three", "four"], "answer": "B"}]
MMLU = {"question": "How many?", "choices": ["one", "two", "three", "four"], "answer": 1}
MMLU_PRO = {"question": "How many?", "options": ["one", "two"], "answer": "B", "answer_index": 1, "category": "math"}
TRUTHFUL = {f"mc{i}_targets": {"choices": ["two", "one"], "labels": [1, 0]} for i in (1, 2)}
HELLASWAG = {"ctx_a": "A man", "ctx_b": "he", "activity_label": "Counting", "endings": ["one", "two"], "label": "1"}
WINOGRANDE = {"sentence": "The _ is two.", "option1": "cup", "option2": "number", "answer": "2"}

# task of a preset: (lm-eval's file of it or of one of its parts, a record in the set's columns, a module that it needs)
SETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "arc_challenge": ("arc/arc_challenge", ARC, ""),
    "arc_challenge_chat": ("arc/arc_challenge_chat", ARC, ""),
    "arc_easy": ("arc/arc_easy", ARC, ""),
    "bbh": ("bbh/cot_fewshot/boolean_expressions", {"input": "not True is", "target": "False"}, ""),
    "ceval-valid": ("ceval/ceval-valid_accountant", CHOICES, ""),
    "cmmlu": ("cmmlu/cmmlu_anatomy", {**CHOICES, "Question": "How many?", "Answer": "B"}, ""),
    "gpqa_main_generative_n_shot": ("gpqa/generative/gpqa_main_generative_n_shot", GPQA, ""),
    "gpqa_main_n_shot": ("gpqa/n_shot/gpqa_main_n_shot", GPQA, ""),
    "gsm8k": ("gsm8k/gsm8k", {"question": "How many?", "answer": "Two.\n#### 2"}, ""),
    "gsm8k_cot": ("gsm8k/gsm8k-cot", {"question": "How many?", "answer": "Two.\n#### 2"}, ""),
    "hellaswag": ("hellaswag/hellaswag", HELLASWAG, ""),
    "humaneval": ("humaneval/humaneval", CODE, "evaluate"),
    "humaneval_instruct": ("humaneval/humaneval_instruct", CODE, "evaluate"),
    "ifeval": (
        "ifeval/ifeval",
        {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "langdetect",
    ),
    "mbpp": ("mbpp/mbpp", CODE, "evaluate"),
    "mbpp_instruct": ("mbpp/mbpp_instruct", CODE, "evaluate"),
    "minerva_math": (
        "minerva_math/minerva_math_algebra",
        {"problem": "1 + 1?", "solution": "It is \\boxed{2}.", "level": "Level 1", "type": "Algebra"},
        "math_verify",
    ),
    "mmlu": ("mmlu/default/mmlu_anatomy", MMLU, ""),
    "mmlu_generative": ("mmlu/generative/mmlu_anatomy", MMLU, ""),
    "mmlu_pro": ("mmlu_pro/mmlu_pro_math", {**MMLU_PRO, "cot_content": "A: Let's think. The answer is (B)."}, ""),
    "piqa": ("piqa/piqa", {"goal": "Count.", "sol1": "one", "sol2": "two", "label": 1}, ""),
    "race": ("race/race", {"article": "One, two.", "problems": str(PROBLEM)}, ""),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2", {"question": "How many?", **TRUTHFUL}, ""),
    "winogrande": ("winogrande/default", WINOGRANDE, ""),
}
CONFIGS: dict[str, dict[str, Any]] = yaml.safe_load(PRESETS.read_text())


def redirect(task: str, folder: Path) -> str:
    """Write a task file that is lm-eval's with local records; returns its name."""
    file, record, _ = SETS[task]
    (folder / "rows.json").write_text(json.dumps([{**record, "number": i} for i in range(9)]))
    files = {split: str(folder / "rows.json") for split in ("train", "validation", "val", "dev", "test")}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    included = {"include": str(FILES / f"{file}.yaml"), "task": f"local_{task}"}
    (folder / "task.yaml").write_text(yaml.safe_dump({**included, **data}))
    return f"local_{task}"


class Metric:
    """`evaluate`'s code_eval, which would come from the Hub."""

    def compute(self, references: Any, predictions: Any, k: Any) -> Any:
        passed = [run_program(f"{p[0]}\n\n{test}") == "passed" for p, test in zip(predictions, references, strict=True)]
        return [{"pass@1": sum(passed) / len(passed)}]


def scaled(kwargs: dict[str, Any]) -> dict[str, int]:
    """gen_length, steps and block_length of `kwargs` for 64 positions, with as many blocks."""
    length = kwargs["gen_length"]
    blocks = length // kwargs.get("block_length", length)
    small = min(length, max(blocks, 16))
    new = {"gen_length": small, "block_length": small // blocks, "steps": small}
    return {name: value for name, value in new.items() if name in kwargs}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [(name, task) for name, one in CONFIGS.items() for task in one["tasks"]])
def test_preset_runs_with_its_settings(name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset, needed = CONFIGS[name], SETS[task][2]
    monkeypatch.setenv("KMP_INIT_AT_FORK", "FALSE")  # which scikit-learn sets for good
    if needed:
        pytest.importorskip(needed)
    if importlib.util.find_spec("evaluate") is not None:
        monkeypatch.setattr("evaluate.load", lambda *_: Metric())
    asked: dict[str, list[dict[str, Any]]] = {"answer_prompts": [], "log_likelihood": []}
    for function, calls in asked.items():
        real = getattr(harness_model, function)
        monkeypatch.setattr(
            harness_model,
            function,
            lambda *args, real=real, calls=calls, **given: calls.append(given) or real(*args, **given),
        )
    model = DREAM_TINY if name.startswith("dream") else LLADA_TINY
    argv = ["--config", name, "--tasks", redirect(task, tmp_path), "--include_path", str(tmp_path), "--limit", "2"]
    argv += ["--model_args", f"pretrained={model}", "--device", "cpu", "--batch_size", "4"]
    kwargs = preset.get("gen_kwargs") or {}
    small = scaled(kwargs) if kwargs else {}
    argv += ["--gen_kwargs", ",".join(f"{key}={value}" for key, value in small.items())] if small else []
    main([*argv, "--output_path", str(tmp_path / "out"), "--confirm_run_unsafe_code"])
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"][f"local_{task}"]
    if "num_fewshot" in preset:
        assert found["n-shot"][f"local_{task}"] == preset["num_fewshot"]
    assert bool(found["chat_template"]) is preset.get("apply_chat_template", False)
    if kwargs:
        (given,) = {json.dumps(call, sort_keys=True, default=str) for call in asked["answer_prompts"]}
        told = json.loads(given)
        expected = {**{key: value for key, value in kwargs.items() if key not in ("do_sample", "until")}, **small}
        expected = {key: value for key, value in expected.items() if (key, value) != ("temperature", 0)}
        assert {key: told.get(key) for key in expected} == expected
        assert told["chat"] is preset.get("apply_chat_template", False)
    else:
        (call,) = asked["log_likelihood"]
        options = preset["model_args"]
        assert (call["samples"], call["cfg_scale"]) == (options.get("samples", 128), options.get("cfg_scale", 0.0))
        assert bool(asked["answer_prompts"]) is options.get("greedy", True)


def test_presets_name_known_sets_and_settings() -> None:
    assert {task for one in CONFIGS.values() for task in one["tasks"]} == set(SETS)
    for name, one in CONFIGS.items():
        assert one["model_args"]["pretrained"].split("/")[1].lower().startswith(name.split("_")[0]), name
        if one.get("gen_kwargs"):
            harness_model.read_gen_kwargs(one["gen_kwargs"])
