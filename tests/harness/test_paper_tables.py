"""examples/paper_tables.py: its commands, going on after a stop, and its tables."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import paper_tables
import pytest

from nara_diffusion.training.arguments.cli import parse_arguments
from tests.harness.conftest import LLADA_TINY
from train_scripts.dllm import Arguments, shipped_run

FIRST = {("base", 0): 50, ("lora", 1): 60, ("lora", 2): 62, ("lora", 3): 64, ("nara", 1): 61, ("nara", 2): 64}
FIRST |= {("nara", 3): 65}  # percent of the first set; each further set has 10 less


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands, which leave what the true ones leave."""
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        flag = "--output_dir" if "--output_dir" in command else "--output_path"
        folder = Path(command[command.index(flag) + 1])
        folder.mkdir(parents=True, exist_ok=True)
        first = FIRST[folder.parts[-3], int(folder.parts[-2].removeprefix("seed-"))]
        scores = {t: {"acc,none": first / 100 - i / 10} for i, t in enumerate(paper_tables.TASKS["math"])}
        samples = {"llm_adapters_svamp": {"original": 24, "effective": 2 if "--limit" in command else 24}}
        name = "results.json" if flag == "--output_dir" else "results_2026.json"
        (folder / name).write_text(json.dumps({"results": scores, "n-samples": samples}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(paper_tables.subprocess, "run", run)
    return commands


def words(output: Path, *further: str) -> list[str]:
    chosen = ["--domains", "math", "--methods", "base", "lora", "nara", "--seeds", "1", "2", "3"]
    return ["--output_dir", str(output), *chosen, *further]


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_tables_have_means_deviations_and_paired_intervals(ran, tmp_path, capsys) -> None:
    paper_tables.main(words(tmp_path))
    assert len(ran) == 1 + 2 * 2 * 3
    header, _, base, lora, nara = rows(capsys.readouterr().out)
    sets = "addsub | aqua | gsm8k | multiarith | svamp | singleeq"
    assert header == f"| method | seeds | {sets} | average | against lora |"
    assert base == "| base | 1 | 50.00 | 40.00 | 30.00 | 20.00 | 10.00 | 0.00 | 25.00 |  |"
    assert lora.startswith("| lora | 3 | 62.00 ± 2.00 | 52.00 ± 2.00 | ")
    assert lora.endswith("| 37.00 ± 2.00 |  |")
    # differences 1, 2, 1: mean 4/3, deviation 0.57735, t(0.975, 2) = 4.30265, so ± 1.4343
    assert nara.startswith("| nara | 3 | 63.33 ± 2.08 | ")
    assert nara.endswith("| +1.33 (-0.10 to +2.77) |")


def test_second_call_runs_only_what_is_left_and_resumes_from_a_checkpoint(ran, tmp_path, capsys) -> None:
    paper_tables.main(words(tmp_path))
    first = len(ran)
    training = tmp_path / "math" / "nara" / "seed-2" / "training"
    (training / "results.json").unlink()
    (training / "checkpoint-4").mkdir()
    paper_tables.main(words(tmp_path))
    (command,) = ran[first:]
    assert command[-2:] == ["--resume_from_checkpoint", "latest"]
    (training.with_name("evaluation") / "results_2026.json").unlink()
    capsys.readouterr()
    paper_tables.main(words(tmp_path, "--dry_run"))
    assert capsys.readouterr().out.count("nara_diffusion.harness.command") == 1
    paper_tables.main(words(tmp_path, "--evaluation_arguments", "--limit 2"))
    assert "**Not the paper's figures: asked were only 2 of 24 of llm_adapters_svamp.**" in capsys.readouterr().out
    assert len(ran) == first + 2


def test_a_command_that_fails_stops_the_rest(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(paper_tables.subprocess, "run", lambda command, check: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="that command failed"):
        paper_tables.main(words(tmp_path))


def test_code_that_a_model_writes_runs_only_if_confirmed(capsys) -> None:
    with pytest.raises(SystemExit):
        paper_tables.main([])
    assert "add --confirm_run_unsafe_code" in capsys.readouterr().err


def test_commands_of_each_domain_and_method_are_understood(tmp_path) -> None:
    text = ["--train_arguments", "--max_train_steps 7", "--launch_arguments", "--num_processes 8"]
    args = paper_tables.parse_arguments(["--output_dir", str(tmp_path), "--confirm_run_unsafe_code", *text])
    for domain in paper_tables.TASKS:
        for method in paper_tables.METHODS[1:]:
            train, evaluate = paper_tables.commands(args, (domain, method, 3))
            parsed = parse_arguments(Arguments, train[train.index("--config") :], stand_in=shipped_run)
            assert (parsed.adapter, parsed.seed, parsed.max_train_steps, parsed.test_file) == (method, 3, 7, None)
            assert parsed.rank == parsed.lora_alpha == 32  # so that the update is scaled by 1
            assert "launch --num_processes 8 -m nara_diffusion.harness.command run" in shlex.join(evaluate)
            model = json.loads(evaluate[evaluate.index("--model_args") + 1])
            assert model == {
                "pretrained": "GSAI-ML/LLaDA-8B-Instruct",
                "dtype": "bfloat16",
                "peft": str(tmp_path / domain / method / "seed-3" / "training"),
            }
            assert ("--confirm_run_unsafe_code" in evaluate) == (domain == "code")


@pytest.mark.slow
def test_from_the_shipped_model_and_tiny_data_to_a_table(tmp_path: Path, capfd) -> None:
    """All true: two trainings, three evaluations, one table."""
    record = {"instruction": "1 + {}", "input": "", "output": "The answer is {}", "answer": "{}"}
    records = [{key: text.format(i) for key, text in record.items()} for i in range(24)]
    folders = ("AddSub", "AQuA", "gsm8k", "MultiArith", "SVAMP", "SingleEq")
    for name in ("math_14k.json", *(f"{folder}/test.json" for folder in folders)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(records))
    training = (
        f"--train_file {tmp_path}/math_14k.json --max_train_steps 2 --validation_samples 4 --max_length 64 "
        "--mixed_precision no --global_batch_size 1 --rank 4 --lora_alpha 4 --no-gradient_checkpointing "
        "--gen_length 8 --generation_steps 4 --block_length 4 --eval_batch_size 8"
    )
    metadata = shlex.quote(json.dumps({"data_dir": str(tmp_path)}))
    options = {
        "pretrained_model_name_or_path": str(LLADA_TINY),
        "train_arguments": training,
        "launch_arguments": "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no",
        "evaluation_arguments": f"--limit 2 --device cpu --gen_kwargs gen_length=8,steps=4,block_length=4 "
        f"--metadata {metadata}",
    }
    argv = ["--output_dir", str(tmp_path / "out"), "--domains", "math", "--methods", "base", "lora", "nara"]
    paper_tables.main([*argv, "--seeds", "1", *(f"--{name}={value}" for name, value in options.items())])
    text = capfd.readouterr().out
    text = text[text.index("## math") :]
    assert [row.split(" | ")[0] for row in rows(text)[2:]] == ["| base", "| lora", "| nara"]
    assert "**Not the paper's figures: asked were only 2 of 24 of llm_adapters_addsub" in text
