"""`nara-eval` as a person runs it: lm-eval's command with our model class and tasks."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager

from nara_diffusion.harness.command import TASKS, adjusted, main, register, with_defaults
from nara_diffusion.harness.loading import load_model
from nara_diffusion.harness.model import NaraDLLM
from tests.helpers.patience import LAST_RESORT

from .conftest import LLADA_TINY, ROWS

ROOT = Path(__file__).parents[2]
BUILD = TaskManager.__init__


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading lm-eval's thousands of task files takes longer than everything else here."""

    def without_defaults(self: TaskManager, *args: object, **kwargs: object) -> None:
        BUILD(self, *args, **{**kwargs, "include_defaults": False})  # type: ignore[arg-type]

    monkeypatch.setattr(TaskManager, "__init__", without_defaults)


@pytest.fixture(autouse=True)
def _loggers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lm-eval sets its logger up for the whole process, on a stderr that pytest then closes."""
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)
    yield
    logger = logging.getLogger("lm_eval")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True


def model_args(adapter: Path) -> str:
    return f"pretrained={LLADA_TINY},peft={adapter}"


def results_in(folder: Path) -> dict:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


@pytest.mark.usefixtures("own_tasks_alone")
def test_all_three_kinds_of_request_in_one_run(
    adapter: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_args", f"{model_args(adapter)},samples=8", "--include_path", str(tasks), "--batch_size", "4"]
    argv += ["--tasks", "tiny_answers,tiny_choices,tiny_texts", "--output_path", str(tmp_path), "--log_samples"]
    main([*argv, "--apply_chat_template", "--gen_kwargs", "gen_length=6,steps=3", "--device", "cpu"])
    found = results_in(tmp_path)
    assert {*found["results"]} == {"tiny_answers", "tiny_choices", "tiny_texts"}
    assert found["config"]["model"] == "nara_dllm"
    assert found["chat_template"].startswith("{% for message in messages %}")
    assert "|tiny_answers|" in capsys.readouterr().out

    harness = NaraDLLM(str(LLADA_TINY), str(adapter), batch_size=2, device="cpu")
    (file,) = tmp_path.rglob("samples_tiny_answers_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    for sample, row in zip(samples, ROWS, strict=True):
        prompt = harness.apply_chat_template([{"role": "user", "content": row["instruction"]}])
        assert sample["arguments"]["gen_args_0"]["arg_0"] == prompt
        ids = harness.tokenizer(prompt, add_special_tokens=False).input_ids
        (answer,) = harness._generated([ids], {"gen_length": 6, "steps": 3}, harness.ends)
        assert sample["resps"] == [[harness._text(answer, harness.ends).split("\n")[0]]]


@pytest.mark.usefixtures("own_tasks_alone")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "auto"], "nara-eval: --batch_size auto: nara_dllm doesn't look for a batch size"),
        (["--gen_kwargs", "steps=5,gen_length=8,block_length=4"], "nara-eval: steps is 5 and there are 2 blocks"),
        (["--gen_kwargs", "gen_length=64"], "nara-eval: gen_length is 64 and the model has 64 positions"),
        (["--tasks", "nonsense"], "nara-eval: .*nonsense"),
        (["--tasks", "nara_mbpp"], "nara-eval: .*mbpp"),
    ],
)
def test_what_can_be_mended_is_told_without_a_traceback(
    adapter: Path, tasks: Path, flags: list[str], message: str
) -> None:
    argv = ["--model_args", model_args(adapter), "--include_path", str(tasks), "--tasks", "tiny_answers", *flags]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code not in (0, None)
    assert re.match(message, str(stopped.value.code), re.DOTALL)


@pytest.mark.usefixtures("own_tasks_alone")
def test_a_system_message_that_the_template_refuses_is_told_without_a_traceback(
    adapter: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> tuple:
        model, tokenizer = load_model(*args, **options)
        refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        tokenizer.chat_template = refusing + str(tokenizer.chat_template)
        return model, tokenizer

    monkeypatch.setattr("nara_diffusion.harness.model.load_model", load)
    argv = ["--model_args", model_args(adapter), "--include_path", str(tasks), "--tasks", "tiny_answers"]
    with pytest.raises(SystemExit, match=r"nara-eval: .*'system', 'user' \(no system role\): leave out the system"):
        main([*argv, "--apply_chat_template", "--system_instruction", "Be kind"])


@pytest.mark.usefixtures("own_tasks_alone")
def test_the_shipped_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ls", "tasks"])
    listed = capsys.readouterr().out
    names = {path.stem for path in TASKS.rglob("*.yaml") if not path.stem.startswith("_")}
    assert len(names) == 19
    assert [name for name in names if f"|{name}" not in listed] == []


def test_help_says_what_is_added_to_lm_evals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "nara-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct" in shown
    assert "Language Model Evaluation Harness" in shown


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    assert get_model("nara_dllm") is NaraDLLM


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--tasks", "x"], ["run", "--model", "nara_dllm", "--tasks", "x"]),
        (["run", "--tasks", "x"], ["run", "--model", "nara_dllm", "--tasks", "x"]),
        (["--model=hf", "--tasks", "x"], ["run", "--model=hf", "--tasks", "x"]),
        (["-C", "run.yaml"], ["run", "-C", "run.yaml"]),
        (["run", "--help"], ["run", "--help"]),
        (["--help"], ["--help"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        ([], []),
    ],
)
def test_what_is_left_out_is_filled_in(given: list[str], expected: list[str]) -> None:
    assert with_defaults(given) == expected


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Any]:
    """lm-eval's configuration of a run with `flags` beside a file of `settings`."""

    def configure(settings: dict, *flags: str) -> Any:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({"tasks": ["llm_adapters_math"], **settings}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["nara-eval", *with_defaults(["--config", str(file), *flags])])
            return EvaluatorConfig.from_cli(adjusted(HarnessCLI().parse_args()))

    return configure


def test_a_file_of_arguments_has_our_model_our_tasks_and_a_device_that_exists(configured) -> None:
    found = configured({"model_args": "pretrained=x"})
    assert (found.model, found.device, found.include_path) == ("nara_dllm", "auto", [str(TASKS)])
    found = configured({"model": None, "device": "cpu", "include_path": "mine"})
    assert (found.model, found.device, found.include_path) == ("nara_dllm", "cpu", [str(TASKS), "mine"])
    found = configured({"include_path": ["mine", "yours"]})
    assert found.include_path == [str(TASKS), "mine", "yours"]


def test_what_the_file_says_stays_and_flags_win_over_it(configured) -> None:
    found = configured({"model": "hf"})
    assert (found.model, found.device) == ("hf", "cuda:0")  # lm-eval's own default for its own models
    found = configured({"model": "hf", "device": "cuda:3", "include_path": "mine"}, "--model", "nara_dllm")
    assert (found.model, found.device, found.include_path) == ("nara_dllm", "cuda:3", [str(TASKS), "mine"])
    found = configured({"include_path": "mine", "device": "cuda:3"}, "--include_path", "yours", "--device", "cpu")
    assert (found.device, found.include_path) == ("cpu", [str(TASKS), "yours"])


@pytest.mark.usefixtures("own_tasks_alone")
def test_a_run_from_a_file_alone(adapter: Path, tasks: Path, tmp_path: Path) -> None:
    settings = {
        "model_args": {"pretrained": str(LLADA_TINY), "peft": str(adapter)},
        "tasks": ["tiny_answers"],
        "include_path": str(tasks),
        "gen_kwargs": {"gen_length": 4},
        "output_path": str(tmp_path),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    main(["--config", str(tmp_path / "run.yaml")])
    assert results_in(tmp_path)["config"]["model"] == "nara_dllm"


@pytest.mark.parametrize(("content", "message"), [("- x", "YAML root must be a mapping"), ("a: [", "Invalid YAML")])
def test_a_file_of_arguments_that_cannot_be_read_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(SystemExit, match=f"nara-eval: {message}"):
        main(["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit, match=r"nara-eval: Config file not found: .*none\.yaml"):
        main(["-C", str(tmp_path / "none.yaml")])


def test_without_lm_eval_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)
    with pytest.raises(SystemExit, match=re.escape("nara-eval needs lm-eval: pip install -e '.[eval]'")):
        main(["--tasks", "x"])


def test_a_package_that_a_task_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(command: object, args: object) -> None:
        raise ModuleNotFoundError("this task needs sympy: pip install lm-eval[math]")

    monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", execute)
    with pytest.raises(SystemExit, match=r"nara-eval: this task needs sympy: pip install lm-eval\[math\]"):
        main(["--tasks", "x"])


PROGRAM = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from nara_diffusion.harness.loading import load_model
from nara_diffusion.harness.model import NaraDLLM

def evaluate(pretrained, peft, tasks, output):
    model = NaraDLLM(pretrained, peft, batch_size=2, samples=8)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = ["tiny_answers", "tiny_choices"]
    found = simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)
    if model.rank == 0:
        answers = {n: sorted((s["doc_id"], s["filtered_resps"]) for s in found["samples"][n]) for n in names}
        scores = {n: found["results"][n] for n in names}
        with open(output, "w") as file:
            json.dump([model.world_size, scores, answers], file)

if __name__ == "__main__":
    evaluate(*sys.argv[1:])
"""


@pytest.mark.slow
def test_several_processes_answer_what_one_answers(adapter: Path, tasks: Path, tmp_path: Path) -> None:
    """Three questions over two processes, so that one of them gets a question for the sake of step alone."""
    program = tmp_path / "evaluate.py"
    program.write_text(PROGRAM)
    arguments = [str(LLADA_TINY), str(adapter), str(tasks)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    subprocess.run([*launch, *arguments, str(tmp_path / "two.json")], check=True, timeout=LAST_RESORT, cwd=ROOT)
    names: dict = {}
    exec(PROGRAM.partition("if __name__")[0], names)
    names["evaluate"](*arguments, str(tmp_path / "one.json"))
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert (two[0], one[0]) == (2, 1)
    assert two[1] == one[1]
    assert two[2]["tiny_answers"] == one[2]["tiny_answers"]
    for (_, ours), (_, theirs) in zip(two[2]["tiny_choices"], one[2]["tiny_choices"], strict=True):
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-5)
