"""The paper's experiments: no run passes for one that was made with other settings."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nara_diffusion.harness.paper.plan import Step
from train_scripts import paper_tables
from train_scripts.paper_tables import main

from .conftest import Done


def recorded(folder: str, run: str) -> dict[str, Any]:
    return json.loads((Path(folder) / run / "settings.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {"model": "dream"}, "model was llada_instruct and is now dream"),
        ({}, {"model": "llada_base"}, "model was llada_instruct and is now llada_base"),
        ({}, {"pretrained_model_name_or_path": "x/y"}, "pretrained_model_name_or_path was none and is now x/y"),
        ({}, {"dtype": "float32"}, "dtype was bfloat16 and is now float32"),
        ({}, {"evaluation_arguments": "--limit=8"}, "evaluation_arguments was none and is now '--limit 8'"),
        ({"evaluation_arguments": "--limit=8"}, {}, "evaluation_arguments was '--limit 8' and is now none"),
        ({"train_arguments": "--rank 8"}, {}, "train_arguments was '--rank 8' and is now none"),
        (
            {"method_arguments": ["nara: --rank 8"]},
            {"method_arguments": ["nara: --rank 4"]},
            "method_arguments was '--rank 8' and is now '--rank 4'",
        ),
        ({"train_arguments": "--revision a"}, {"methods": ["base"]}, "revision was a and is now none"),
    ],
    ids=str,
)
def test_a_call_with_other_settings_is_refused(
    arguments, performed: list[Step], before: dict, now: dict, told: str
) -> None:
    args = arguments(**before)
    main(args)
    tables, done = Path(args.output_dir, "tables.md").read_text(), len(performed)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=re.escape(told)) as error:
            main(arguments(**now, dry_run=dry_run))
        assert f"{args.output_dir} holds runs that were made with other settings" in str(error.value)
        assert "Name another --output_dir, use those settings, or delete the folders of these runs" in str(error.value)
    assert len(performed) == done
    assert Path(args.output_dir, "tables.md").read_text() == tables


def test_the_runs_that_differ_are_named(arguments, performed: list[Step]) -> None:
    main(arguments(methods=["base", "lora"], seeds=[1, 2]))
    with pytest.raises(ValueError, match=r"\(math/base/seed-1 and 2 more\)\. Name another"):
        main(arguments(dtype="float16", methods=["nara"]))
    with pytest.raises(ValueError, match=r"\(math/lora/seed-1 and 1 more\)\. Name another"):
        main(arguments(train_arguments="--rank 8"))


@pytest.mark.parametrize(
    "now",
    [
        {"seeds": [3]},
        {"methods": ["lora"]},
        {"batch_size": 2},
        {"launch_arguments": "--num_processes 8"},
        {"with_math": True},
        {"evaluation_arguments": "--limit=4"},
        {"methods": ["lora"], "method_arguments": ["lora: --rank 8"]},
        {"methods": ["base"], "train_arguments": "--rank 8"},
    ],
    ids=str,
)
def test_what_chooses_a_part_or_how_much_at_once_may_differ(arguments, performed: list[Step], now: dict) -> None:
    main(
        arguments(methods=["base"] if "train_arguments" in now else ["base", "nara"], evaluation_arguments="--limit 4")
    )
    main(arguments(**{"evaluation_arguments": "--limit 4", **now}))


def test_a_run_records_what_it_was_made_with(arguments, performed: list[Step]) -> None:
    args = arguments(train_arguments="--revision=a --rank 8", method_arguments=["nara: --seed_of x"])
    main(args)
    base, nara = (recorded(args.output_dir, f"math/{method}/seed-1") for method in ("base", "nara"))
    assert {name: nara[name] for name in ("model", "pretrained_model_name_or_path", "revision", "dtype")} == {
        "model": "llada_instruct",
        "pretrained_model_name_or_path": None,
        "revision": "a",
        "dtype": "bfloat16",
    }
    assert nara["train_arguments"] == ["--revision", "a", "--rank", "8"]
    assert nara["method_arguments"] == ["--seed_of", "x"]
    assert nara["configuration"]["learning_rate"] == 1e-4
    assert set(nara["data"]) == {
        "math_14k.json",
        *(f"{name}/test.json" for name in paper_tables.DOMAINS["math"].test_files),
    }
    assert "train_arguments" not in base
    assert base["configuration"] == {"pretrained_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct"}
    assert list(Path(args.output_dir).rglob(".*")) == []


def test_other_data_are_refused(arguments, performed: list[Step]) -> None:
    args = arguments(methods=["lora"])
    main(args)
    file = Path(args.data_dir) / "AQuA" / "test.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"data AQuA/test.json was \w{16} and is now \w{16} \(math/lora/seed-1 and"):
        main(args)
    shutil.move(file, file.with_name("aside"))
    main(arguments(methods=["lora"], dry_run=True))  # what isn't there can't be compared


def test_another_configuration_is_refused(
    arguments, performed: list[Step], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(paper_tables.HERE / "configs", tmp_path / "configs")
    monkeypatch.setattr(paper_tables, "HERE", tmp_path)
    main(arguments(methods=["lora"]))
    config = tmp_path / "configs" / "llada_instruct_math14k.yaml"
    config.write_text(config.read_text().replace("max_length: 512", "complementary: true"))
    with pytest.raises(ValueError, match="other settings") as error:
        main(arguments(methods=["nara"]))
    assert "configuration max_length was 512 and is now none (math/lora" in str(error.value)
    assert "configuration complementary was none and is now True (math/lora" in str(error.value)
    other = tmp_path / "configs" / "llada_instruct_commonsense170k.yaml"
    other.write_text(config.read_text())
    with pytest.raises(ValueError, match="max_length"):
        main(arguments(domains=["math", "commonsense"], dry_run=True))
    main(arguments(domains=["commonsense"], dry_run=True))


@pytest.mark.parametrize("record", [None, "{ half", "[]"])
def test_a_run_without_its_record_is_refused(arguments, performed: list[Step], record: str | None) -> None:
    args = arguments(methods=["lora"], seeds=[1])
    main(args)
    file = Path(args.output_dir) / "math" / "lora" / "seed-1" / "settings.json"
    file.unlink() if record is None else file.write_text(record)
    for changes in ({}, {"methods": ["nara"]}):
        with pytest.raises(
            ValueError, match=r"math/lora/seed-1 holds a run, and no settings.json .* delete the folder"
        ):
            main(arguments(**{"methods": ["lora"], **changes}))


@pytest.mark.parametrize("left", ["training/checkpoint-4", "evaluation/answers_rank0.db"])
def test_a_run_that_was_stopped_is_refused_too(
    arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: str
) -> None:
    def run(command: tuple[str, ...], check: bool) -> Done:
        (Path(args.output_dir) / "math" / "lora" / "seed-1" / left).mkdir(parents=True, exist_ok=True)
        ran.append(command)
        return Done()

    ran: list[tuple[str, ...]] = []
    args = arguments(methods=["lora"], seeds=[1])
    monkeypatch.setattr("train_scripts.paper_tables.subprocess.run", run)
    with pytest.raises(SystemExit, match="failed: train lora"):
        main(args)
    with pytest.raises(ValueError, match="dtype was bfloat16 and is now float32"):
        main(arguments(methods=["lora"], seeds=[1], dtype="float32"))
    assert len(ran) == 1


def test_a_run_that_left_nothing_may_be_begun_with_other_settings(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_scripts.paper_tables.subprocess.run", lambda command, check: Done())
    args = arguments(methods=["lora"], seeds=[1])
    for name in ("misspelt", None):
        with pytest.raises(SystemExit, match="failed: train lora"):
            main(dataclasses.replace(args, pretrained_model_name_or_path=name))
    assert recorded(args.output_dir, "math/lora/seed-1")["pretrained_model_name_or_path"] is None


def test_runs_that_another_machine_made_meanwhile_with_other_settings_stay_out_of_the_tables(
    arguments, performed: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(methods=["lora"], seeds=[1])
    noted = paper_tables.perform

    def perform(step: Step) -> bool:
        if step.tasks:  # the other's, begun before there was any run to compare with
            folder = Path(args.output_dir) / "math" / "nara" / "seed-2"
            shutil.copytree(step.folder.parent, folder)
            settings = recorded(args.output_dir, "math/nara/seed-2")
            (folder / "settings.json").write_text(json.dumps({**settings, "dtype": "float16"}))
        return noted(step)

    monkeypatch.setattr(paper_tables, "perform", perform)
    with pytest.raises(ValueError, match=r"dtype was float16 and is now bfloat16 \(math/nara/seed-2\)"):
        main(args)
    assert not (Path(args.output_dir) / "tables.md").exists()


def test_the_revision_that_is_trained_is_evaluated(arguments) -> None:
    plan = paper_tables.plan_of(arguments(train_arguments="--revision=a"))
    for method, revision in (("base", "a"), ("lora", "a"), ("full", None)):
        step = plan.evaluation_step("math", method, 1)
        assert json.loads(step.command[step.command.index("--model_args") + 1]).get("revision") == revision
