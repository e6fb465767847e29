"""The script that makes the paper's tables: its commands, going on after a stop, and the tables themselves."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nara_diffusion.harness.command import TASKS
from nara_diffusion.harness.paper.plan import DOMAINS, METHODS, SAMPLING, Step, result_of
from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.arguments.cli import parse_arguments
from tests.harness.conftest import LLADA_TINY
from train_scripts import paper_tables
from train_scripts.dllm import Arguments, shipped_run
from train_scripts.paper_tables import PaperArguments, main

from .conftest import MATH, Done, tables_of


def test_the_tables_have_means_deviations_and_paired_intervals(arguments, performed: list[Step]) -> None:
    args = arguments()
    main(args)
    text = (Path(args.output_dir) / "tables.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        rows[0] == "| method | seeds | AddSub | AQuA | GSM8K | MultiArith | SVAMP | SingleEq | Average | against LoRA |"
    )
    assert rows[2] == "| no fine-tuning | 1 | 50.00 | 40.00 | 30.00 | 20.00 | 10.00 | 0.00 | 25.00 |  |"
    assert rows[3].startswith("| LoRA | 3 | 62.00 ± 2.00 | 52.00 ± 2.00 | ")
    assert rows[3].endswith("| 37.00 ± 2.00 |  |")
    # differences 1, 2, 1: mean 4/3, deviation 0.57735, t(0.975, 2) = 4.30265, so ± 1.4343
    assert rows[4].startswith("| NaRA | 3 | 63.33 ± 2.08 | ")
    assert rows[4].endswith("| +1.33 (-0.10 to +2.77) |")
    assert len(rows) == 5


def test_one_seed_of_everything_comes_first_and_the_base_once(arguments, performed: list[Step]) -> None:
    main(arguments())
    assert [step.title for step in performed][:5] == [
        "evaluate base on math, seed 1",
        "train lora on math, seed 1",
        "evaluate lora on math, seed 1",
        "train nara on math, seed 1",
        "evaluate nara on math, seed 1",
    ]
    assert len(performed) == 1 + 2 * 2 * 3


def test_what_is_done_is_not_done_again(arguments, performed: list[Step]) -> None:
    args = arguments()
    main(args)
    first = len(performed)
    main(args)
    assert len(performed) == first
    folder = Path(args.output_dir) / "math" / "nara" / "seed-2" / "evaluation"
    (found,) = folder.rglob("results_*.json")
    found.write_text("{ half")
    main(args)
    assert [step.title for step in performed[first:]] == ["evaluate nara on math, seed 2"]


def test_a_training_goes_on_from_its_checkpoint_and_begins_anew_without_one(
    arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = arguments(methods=["lora"], seeds=[1])
    training = Path(args.output_dir) / "math" / "lora" / "seed-1" / "training"
    (step, _) = paper_tables.plan_of(args).steps("math", "lora", 1)
    assert "--resume_from_checkpoint" not in step.command
    (training / "checkpoint-4").mkdir(parents=True)
    (step, _) = paper_tables.plan_of(args).steps("math", "lora", 1)
    assert step.command[-2:] == ("--resume_from_checkpoint", "latest")

    ran: list[tuple[str, ...]] = []

    def run(command: tuple[str, ...], check: bool) -> Done:
        ran.append((*command, str(training.exists())))
        return Done()

    monkeypatch.setattr("train_scripts.paper_tables.subprocess.run", run)
    assert not paper_tables.perform(step)  # it left no result
    assert ran[-1][-1] == "True"
    (training / "checkpoint-4").rmdir()
    (training / "metrics.jsonl").write_text("half")
    evaluation = training.with_name("evaluation")
    evaluation.mkdir()
    paper_tables.perform(step)
    assert ran[-1][-1] == "False"
    assert not evaluation.exists()  # it was of other weights


def test_an_evaluation_goes_on_with_the_next_question(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = paper_tables.plan_of(arguments())
    _, step = plan.steps("math", "lora", 1)
    assert step.command[step.command.index("--use_cache") + 1] == str(step.folder / "answers")
    step.folder.mkdir(parents=True)
    (step.folder / "answers_rank0.db").write_text("some")
    monkeypatch.setattr("train_scripts.paper_tables.subprocess.run", lambda command, check: Done())
    assert not paper_tables.perform(step)
    assert (step.folder / "answers_rank0.db").exists()


def test_a_failure_stops_the_rest_and_is_told(
    arguments, performed: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = paper_tables.perform
    monkeypatch.setattr(paper_tables, "perform", lambda step: "train lora" not in step.title and noted(step))
    with pytest.raises(SystemExit, match=r"failed: train lora on math, seed 1\. What is done is kept"):
        main(arguments())
    assert [step.title for step in performed] == ["evaluate base on math, seed 1"]
    with pytest.raises(SystemExit, match="train lora on math, seed 1; train lora on math, seed 2; train lora"):
        main(arguments(keep_going=True))
    assert [step.title for step in performed[1:]] == [
        f"{what} nara on math, seed {seed}" for seed in (1, 2, 3) for what in ("train", "evaluate")
    ]


def test_a_dry_run_shows_and_touches_nothing(
    arguments, performed: list[Step], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = arguments(domains=["math", "code"], dry_run=True, data_dir=str(tmp_path / "none"), methods=["nara"])
    main(args)
    shown = capsys.readouterr().out
    assert shown.startswith("12 steps are left to do")
    assert "# fetch https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset/AQuA/test.json" in shown
    commands = [line for line in shown.splitlines() if line and not line.startswith("#")][1:]
    assert len(commands) == 12
    assert not performed
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "base"])
def test_the_training_scripts_arguments_are_right(arguments, domain: str, method: str) -> None:
    args = arguments(train_arguments="--max_train_steps 7", method_arguments=[f"{method}: --learning_rate 0.5"])
    step, _ = paper_tables.plan_of(args).steps(domain, method, 3)
    flags = step.command[step.command.index("--config") :]
    parsed = parse_arguments(Arguments, flags, stand_in=shipped_run)
    assert parsed.adapter == method
    assert parsed.pretrained_model_name_or_path == "GSAI-ML/LLaDA-8B-Instruct"
    assert parsed.train_file == str(Path(args.data_dir) / DOMAINS[domain].train_file)
    assert (parsed.seed, parsed.max_train_steps, parsed.learning_rate, parsed.test_file) == (3, 7, 0.5, None)
    assert parsed.rank == parsed.lora_alpha == 32  # so that the update is scaled by 1


def test_each_lora_of_multi_lora_has_the_rank_of_the_single_one(arguments) -> None:
    step, _ = paper_tables.plan_of(arguments()).steps("math", "multi_lora", 3)
    parsed = parse_arguments(Arguments, step.command[step.command.index("--config") :], stand_in=shipped_run)
    config: Any = adapter_config(parsed)
    assert config.core_bins == 5
    assert config.r // config.core_bins == 32
    assert config.lora_alpha == config.r


def test_the_evaluation_asks_what_the_paper_asks(arguments) -> None:
    plan = paper_tables.plan_of(arguments(evaluation_arguments="--limit 4", launch_arguments="--num_processes 8"))
    _, step = plan.steps("math", "nara", 3)
    text = shlex.join(step.command)
    assert "accelerate.commands.launch --num_processes 8 -m nara_diffusion.harness.command run" in text
    assert ",".join(MATH) in text
    assert text.endswith("--limit 4")
    model = json.loads(step.command[step.command.index("--model_args") + 1])
    assert model["peft"].endswith("math/nara/seed-3/training")
    _, full = plan.steps("math", "full", 3)
    model = json.loads(full.command[full.command.index("--model_args") + 1])
    assert model["pretrained"].endswith("math/full/seed-3/training")
    assert "peft" not in model
    _, code = plan.steps("code", "nara", 3)
    assert "--confirm_run_unsafe_code" in code.command
    assert "--confirm_run_unsafe_code" not in step.command


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ["code"]}, "the table code runs programs that the model writes: add --confirm_run_unsafe_code"),
        ({"seeds": []}, "seeds is [], expected one or more"),
        ({"methods": ["nara", "nara"]}, "expected one or more, each once"),
        ({"method_arguments": ["nora: --rank 2"]}, "method_arguments has 'nora: --rank 2', expected 'METHOD: --flag"),
    ],
)
def test_refusals(arguments, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments(**changes)


def test_a_model_without_a_configuration_is_told(arguments) -> None:
    with pytest.raises(
        ValueError, match=r"there is no .*dream_commonsense170k.yaml: leave commonsense out of --domains"
    ):
        paper_tables.plan_of(arguments(model="dream", domains=["commonsense"]))


def change_result(args: PaperArguments, change: Callable[[dict], object]) -> None:
    (file,) = Path(args.output_dir).rglob("results_*.json")
    result = json.loads(file.read_text())
    change(result["results"])
    file.write_text(json.dumps(result))


def test_an_evaluation_without_a_set_is_done_again(arguments, performed: list[Step]) -> None:
    args = arguments(methods=["base"])
    main(args)
    change_result(args, lambda results: results.pop("llm_adapters_svamp"))
    main(args)
    assert [step.title for step in performed] == 2 * ["evaluate base on math, seed 1"]


def test_a_score_of_another_name_is_told(arguments, performed: list[Step]) -> None:
    args = arguments(methods=["base"])
    main(args)
    change_result(args, lambda results: results.update(llm_adapters_svamp={"f1,none": 0.5}))
    with pytest.raises(ValueError, match="has no score of llm_adapters_svamp, only f1,none: delete it"):
        main(args)


def test_math_stands_beside_the_mean(arguments, performed: list[Step]) -> None:
    main(arguments(methods=["base"]))
    args = arguments(methods=["base", "lora"], with_math=True)
    main(args)
    assert len(performed) == 1 + 1 + 2 * 3  # the base was asked too little
    assert all(step.command[-2:] == ("--gen_kwargs", SAMPLING) for step in performed[1:] if step.tasks)
    rows = [line for line in (Path(args.output_dir) / "tables.md").read_text().splitlines() if line.startswith("|")]
    assert rows[0].endswith("| SingleEq | Average | MATH | against LoRA |")
    assert rows[2].endswith("| 0.00 | 25.00 | 25.00 |  |")
    assert rows[3].endswith("| 37.00 ± 2.00 | 31.00 ± 1.00 |  |")


def test_the_settings_for_math_are_those_of_the_shipped_tasks() -> None:
    settings = yaml.safe_load((TASKS / "code" / "_common.yaml").read_text())["generation_kwargs"]
    assert ",".join(f"{name}={settings[name]}" for name in ("gen_length", "steps", "block_length")) == SAMPLING


def test_the_newest_whole_result_counts(tmp_path: Path) -> None:
    assert result_of(tmp_path, "*.json") is None
    (tmp_path / "a.json").write_text('{"n": 1}')
    (tmp_path / "b.json").write_text('{"n":')
    assert result_of(tmp_path, "*.json") == {"n": 1}


@pytest.mark.slow
def test_from_the_shipped_model_and_tiny_data_to_a_table(tmp_path: Path) -> None:
    """All true: two trainings, three evaluations, one table."""
    record = {"instruction": "1 + {}", "input": "", "output": "The answer is {}", "answer": "{}"}
    records = [{key: text.format(i) for key, text in record.items()} for i in range(24)]
    for name in ("math_14k.json", *(f"{folder}/test.json" for folder in DOMAINS["math"].test_files)):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records))
    length = "--gen_length 8 --generation_steps 4 --block_length 4 --eval_batch_size 8"
    args = PaperArguments(
        output_dir=str(tmp_path / "out"),
        data_dir=str(tmp_path / "data"),
        domains=["math"],
        methods=["base", "lora", "nara"],
        seeds=[1],
        pretrained_model_name_or_path=str(LLADA_TINY),
        dtype="float32",
        train_arguments=f"--max_train_steps 2 --validation_samples 4 --max_length 64 --mixed_precision no "
        f"--global_batch_size 1 --rank 4 --lora_alpha 4 --no-gradient_checkpointing {length}",
        launch_arguments="--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no",
        evaluation_arguments="--limit 2 --device cpu --gen_kwargs gen_length=8,steps=4,block_length=4",
    )
    main(args)
    rows = [line for line in (tmp_path / "out" / "tables.md").read_text().splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| no fine-tuning", "| LoRA", "| NaRA"]
    assert "**Not the paper's figures: asked were only 2 of 24 questions of AddSub, 2 of 24" in tables_of(args)
    assert f"Model: `{LLADA_TINY}`" in tables_of(args)
    main(args)  # nothing is left to do
