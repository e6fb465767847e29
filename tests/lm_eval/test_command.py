"""`nara-eval` as a person runs it: lm-eval's command with our model class, tasks and presets."""

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
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from nara_diffusion.lm_eval import harness_model
from nara_diffusion.lm_eval.__main__ import PRESETS, TASKS, main, with_config
from nara_diffusion.lm_eval.harness_text import read_gen_kwargs

from .conftest import LLADA_TINY, ROWS

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, dict[str, Any]] = yaml.safe_load(PRESETS.read_text())


def results_in(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_both_kinds_of_request_in_one_run(
    adapter: str, tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_args", f"pretrained={LLADA_TINY},peft={adapter},samples=8", "--include_path", tasks]
    argv += ["--tasks", "tiny_answers,tiny_choices", "--output_path", str(tmp_path), "--log_samples"]
    main([*argv, "--apply_chat_template", "--gen_kwargs", "gen_length=6,steps=3", "--device", "cpu"])
    figures = results_in(tmp_path)
    assert {*figures["results"]} == {"tiny_answers", "tiny_choices"}
    assert figures["config"]["model"] == "nara_dllm"
    assert figures["chat_template"].startswith("{% for message in messages %}")
    assert "|tiny_answers|" in capsys.readouterr().out
    (file,) = tmp_path.rglob("samples_tiny_answers_*.jsonl")
    prompts = [json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in file.read_text().splitlines()]
    assert all(row["instruction"] in prompt for row, prompt in zip(ROWS, prompts, strict=True))


def test_fixable_mistakes_are_reported_without_traceback(tasks: str) -> None:
    for flags, message in [
        (["--batch_size", "auto"], "nara-eval: --batch_size is auto, but nara_dllm can't search for one"),
        (["--gen_kwargs", "steps=5,gen_length=8,block_length=4"], "nara-eval: gen_kwargs: steps is 5 and there are"),
        (["--tasks", "nonsense"], "nara-eval: .*nonsense"),
        (["--config", "llada_base"], "nara-eval: --config llada_base is not a file, nor one of the presets .*dream_"),
        (["--tasks", "llm_adapters_gsm8k"], "nara-eval: .*gsm8k"),  # whose data aren't here
    ]:
        argv = ["--model_args", f"pretrained={LLADA_TINY}", "--include_path", tasks, "--tasks", "tiny_answers", *flags]
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert re.match(message, str(stopped.value.code), re.DOTALL)


def test_shipped_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ls", "tasks"])
    listed = capsys.readouterr().out
    names = {path.stem for path in TASKS.rglob("*.yaml") if not path.stem.startswith("_")}
    assert len(names) == 16
    assert [name for name in names if f"|{name}" not in listed] == []


def test_arguments_file_names_our_model_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    for settings, flags, (model, device, paths) in [
        ({}, [], ("nara_dllm", "auto", [])),
        ({"device": "cpu", "include_path": "mine"}, [], ("nara_dllm", "cpu", ["mine"])),
        ({"model": "hf"}, [], ("hf", "cuda:0", [])),  # lm-eval's own default for its own models
        ({"model": "hf", "include_path": "mine"}, ["--model", "nara_dllm"], ("nara_dllm", "auto", ["mine"])),
        ({"device": "cuda:3"}, ["--device", "cpu", "--include_path", "yours"], ("nara_dllm", "cpu", ["yours"])),
    ]:
        file.write_text(yaml.safe_dump({"tasks": ["llm_adapters_math"], "model_args": "pretrained=x", **settings}))
        monkeypatch.setattr("sys.argv", ["nara-eval", "run", "--config", str(file), *flags])
        config = EvaluatorConfig.from_cli(with_config(HarnessCLI().parse_args()))
        assert (config.model, config.device, config.include_path) == (model, device, [str(TASKS), *paths])


def test_preset_entries_are_overridden_by_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--config", "llada_base_generation", "--model_args", "peft=mine", "--gen_kwargs", "steps=256"]
    monkeypatch.setattr("sys.argv", ["nara-eval", "run", *flags, "--tasks", "gsm8k"])
    config = EvaluatorConfig.from_cli(with_config(HarnessCLI().parse_args()))
    assert config.model_args == {"pretrained": "GSAI-ML/LLaDA-8B-Base", "peft": "mine"}
    assert config.gen_kwargs == {"gen_length": 1024, "steps": 256, "block_length": 1024}
    assert (config.tasks, config.model) == (["gsm8k"], "nara_dllm")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)
    with pytest.raises(SystemExit, match=re.escape("nara-eval needs lm-eval: pip install 'nara-diffusion[eval]'")):
        main(["--tasks", "x"])


@pytest.mark.slow
def test_two_processes_answer_what_one_answers(adapter: str, tasks: str, tmp_path: Path) -> None:
    argv = ["--model_args", f"pretrained={LLADA_TINY},peft={adapter},samples=8", "--device", "cpu", "--log_samples"]
    argv += ["--include_path", tasks, "--tasks", "tiny_answers,tiny_choices", "--output_path"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    subprocess.run([*launch, "nara_diffusion.lm_eval", *argv, str(tmp_path / "two")], check=True, cwd=ROOT)
    main([*argv, str(tmp_path / "one")])
    two, one = (results_in(tmp_path / name)["results"] for name in ("two", "one"))
    assert two == one
    for task in one:
        files = (next((tmp_path / name).rglob(f"samples_{task}_*")) for name in ("two", "one"))
        samples = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
        answers, expected = (sorted((s["doc_id"], str(s["filtered_resps"])[:20]) for s in one) for one in samples)
        assert answers == expected


# ---------------------------------------------------------------- presets


def single_task(manager: TaskManager, task: Any) -> dict[str, Any]:
    """The file of a task of lm-eval's, or of the first of a group."""
    if isinstance(task, str):
        entry = manager.task_index[task]
        task = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {"task": sorted(entry.tags)}
    return task if isinstance(task["task"], str) else single_task(manager, task["task"][0])


@pytest.mark.slow
def test_presets_name_existing_tasks_with_generated_answers(monkeypatch) -> None:
    monkeypatch.undo()  # with lm-eval's own tasks
    manager = TaskManager()
    for name, preset in CONFIGS.items():
        assert preset["model_args"]["pretrained"].split("/")[1].lower().startswith(name.split("_")[0]), name
        for task in (single_task(manager, task) for task in preset["tasks"]):
            assert (task["output_type"] == "generate_until") is bool(preset.get("gen_kwargs")), name
            read_gen_kwargs({**task.get("generation_kwargs", {}), **preset.get("gen_kwargs", {})})


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_preset_runs_with_its_settings(name: str, tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for lengths all of them reach `generate` and `log_likelihood`."""
    preset, by_function = CONFIGS[name], {"answer_prompts": [], "log_likelihood": []}
    for function, calls in by_function.items():
        real = getattr(harness_model, function)
        watched = lambda *args, real=real, calls=calls, **given: calls.append(given) or real(*args, **given)  # noqa: E731
        monkeypatch.setattr(harness_model, function, watched)
    kwargs = preset.get("gen_kwargs") or {}
    small = {name: 16 for name in ("gen_length", "steps", "block_length") if name in kwargs}  # of 64 positions
    task = "tiny_answers" if kwargs else "tiny_choices"
    model = Path(LLADA_TINY).with_name("dream-tiny" if name.startswith("dream") else "llada-tiny")
    argv = ["--config", name, "--tasks", task, "--include_path", tasks, "--limit", "2", "--batch_size", "4"]
    argv += ["--model_args", f"pretrained={model}", "--device", "cpu", "--output_path", str(tmp_path)]
    argv += ["--gen_kwargs", ",".join(f"{key}={value}" for key, value in small.items())] if small else []
    main(argv)
    figures = results_in(tmp_path)
    if "num_fewshot" in preset:
        assert figures["n-shot"][task] == preset["num_fewshot"]
    assert bool(figures["chat_template"]) is preset.get("apply_chat_template", False)
    if kwargs:
        (given,) = {json.dumps(call, sort_keys=True, default=str) for call in by_function["answer_prompts"]}
        expected = {**{key: value for key, value in kwargs.items() if key not in ("do_sample", "until")}, **small}
        expected = {key: value for key, value in expected.items() if (key, value) != ("temperature", 0)}
        expected |= {"chat": preset.get("apply_chat_template", False)}
        assert {key: json.loads(given).get(key) for key in expected} == expected
    else:
        (call,), options = by_function["log_likelihood"], preset["model_args"]
        assert (call["samples"], call["cfg_scale"]) == (options.get("samples", 128), options.get("cfg_scale", 0.0))
        assert bool(by_function["answer_prompts"]) is options.get("greedy", True)
