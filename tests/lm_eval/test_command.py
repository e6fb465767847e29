"""`nara-eval` as a person runs it: lm-eval's command with our model class and tasks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from nara_diffusion.lm_eval.__main__ import TASKS, adjusted, main

from .conftest import LLADA_TINY, ROWS

ROOT = Path(__file__).parents[2]


def results_in(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def test_both_kinds_of_request_in_one_run(
    adapter: str, tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_args", f"pretrained={LLADA_TINY},peft={adapter},samples=8", "--include_path", tasks]
    argv += ["--tasks", "tiny_answers,tiny_choices", "--output_path", str(tmp_path), "--log_samples"]
    main([*argv, "--apply_chat_template", "--gen_kwargs", "gen_length=6,steps=3", "--device", "cpu"])
    found = results_in(tmp_path)
    assert {*found["results"]} == {"tiny_answers", "tiny_choices"}
    assert found["config"]["model"] == "nara_dllm"
    assert found["chat_template"].startswith("{% for message in messages %}")
    assert "|tiny_answers|" in capsys.readouterr().out
    (file,) = tmp_path.rglob("samples_tiny_answers_*.jsonl")
    asked = [json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in file.read_text().splitlines()]
    assert all(row["instruction"] in prompt for row, prompt in zip(ROWS, asked, strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "auto"], "nara-eval: --batch_size auto: nara_dllm doesn't look for one"),
        (
            ["--gen_kwargs", "steps=5,gen_length=8,block_length=4"],
            "nara-eval: gen_kwargs: steps is 5 and there are 2 blocks",
        ),
        (["--tasks", "nonsense"], "nara-eval: .*nonsense"),
        (
            ["--config", "llada_base"],
            "nara-eval: --config llada_base: there is no such file, and the presets are .*dream_",
        ),
        (["--tasks", "nara_mbpp"], "nara-eval: .*mbpp"),  # without --confirm_run_unsafe_code
    ],
)
def test_what_can_be_mended_is_said_without_a_traceback(tasks: str, flags: list[str], message: str) -> None:
    argv = ["--model_args", f"pretrained={LLADA_TINY}", "--include_path", tasks, "--tasks", "tiny_answers", *flags]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert re.match(message, str(stopped.value.code), re.DOTALL)


def test_shipped_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ls", "tasks"])
    listed = capsys.readouterr().out
    names = {path.stem for path in TASKS.rglob("*.yaml") if not path.stem.startswith("_")}
    assert len(names) == 19
    assert [name for name in names if f"|{name}" not in listed] == []


@pytest.mark.parametrize(
    ("settings", "flags", "expected"),
    [
        ({}, [], ("nara_dllm", "auto", [])),
        ({"device": "cpu", "include_path": "mine"}, [], ("nara_dllm", "cpu", ["mine"])),
        ({"model": "hf"}, [], ("hf", "cuda:0", [])),  # lm-eval's own default for its own models
        ({"model": "hf", "include_path": "mine"}, ["--model", "nara_dllm"], ("nara_dllm", "auto", ["mine"])),
        ({"device": "cuda:3"}, ["--device", "cpu", "--include_path", "yours"], ("nara_dllm", "cpu", ["yours"])),
    ],
)
def test_a_file_of_arguments_has_our_model_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], flags: list[str], expected: Any
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"tasks": ["llm_adapters_math"], "model_args": "pretrained=x", **settings}))
    monkeypatch.setattr("sys.argv", ["nara-eval", "run", "--config", str(file), *flags])
    found = EvaluatorConfig.from_cli(adjusted(HarnessCLI().parse_args()))
    model, device, paths = expected
    assert (found.model, found.device, found.include_path) == (model, device, [str(TASKS), *paths])


def test_a_preset_is_named_and_flags_win_entry_by_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--config", "llada_base_generation", "--model_args", "peft=mine", "--gen_kwargs", "steps=256"]
    monkeypatch.setattr("sys.argv", ["nara-eval", "run", *flags, "--tasks", "gsm8k"])
    found = EvaluatorConfig.from_cli(adjusted(HarnessCLI().parse_args()))
    assert found.model_args == {"pretrained": "GSAI-ML/LLaDA-8B-Base", "peft": "mine"}
    assert found.gen_kwargs == {"gen_length": 1024, "steps": 256, "block_length": 1024}
    assert (found.tasks, found.model) == (["gsm8k"], "nara_dllm")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)
    with pytest.raises(SystemExit, match=re.escape("nara-eval needs lm-eval: pip install -e '.[eval]'")):
        main(["--tasks", "x"])


PROGRAM = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from nara_diffusion.lm_eval.harness_model import NaraDLLM

def evaluate(pretrained, peft, tasks, output):
    model = NaraDLLM(pretrained, peft, batch_size=2, samples=8)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = ["tiny_answers", "tiny_choices"]
    found = simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)
    if model.rank == 0:
        answers = {n: sorted((s["doc_id"], str(s["filtered_resps"])[:20]) for s in found["samples"][n]) for n in names}
        with open(output, "w") as file:
            json.dump([model.world_size, {n: found["results"][n] for n in names}, answers], file)

if __name__ == "__main__":
    evaluate(*sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_answer_what_one_answers(adapter: str, tasks: str, tmp_path: Path) -> None:
    program = tmp_path / "evaluate.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    subprocess.run([*launch, LLADA_TINY, adapter, tasks, str(tmp_path / "two.json")], check=True, cwd=ROOT)
    names: dict[str, Any] = {}
    exec(PROGRAM.partition("if __name__")[0], names)
    names["evaluate"](LLADA_TINY, adapter, tasks, str(tmp_path / "one.json"))
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert (two[0], one[0]) == (2, 1)
    assert two[1:] == one[1:]
