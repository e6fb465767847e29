"""tables.md: of all runs in the folder, whichever call or machine made them, and what they were made with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nara_diffusion.harness.paper.plan import Step
from train_scripts import paper_tables
from train_scripts.paper_tables import main

from .conftest import MATH, tables_of


def test_a_part_leaves_the_rest_of_the_tables(
    arguments, performed: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_tables, "fetch", lambda plan, domains: None)
    args = arguments()
    main(args)
    whole = tables_of(args)
    for part in (
        {"methods": ["nara"], "seeds": [2]},
        {"methods": ["base"]},
        {"domains": ["commonsense"], "seeds": [1]},
    ):
        main(arguments(**part))
        assert tables_of(args) == whole


def test_the_order_of_the_rows_is_not_that_of_the_calls(arguments, performed: list[Step]) -> None:
    for part in ({"methods": ["nara"], "seeds": [3]}, {"methods": ["lora"]}, {"methods": ["nara", "base"]}):
        args = arguments(**part)
        main(args)
    parts = tables_of(args)
    main(arguments(output_dir=f"{args.output_dir}-2"))
    assert parts == tables_of(arguments(output_dir=f"{args.output_dir}-2"))


def test_another_seeds_call_does_not_evaluate_the_base_again(arguments, performed: list[Step]) -> None:
    main(arguments(seeds=[1]))
    args = arguments(seeds=[2, 3])
    main(args)
    assert [step.title for step in performed if "base" in step.title] == ["evaluate base on math, seed 1"]
    whole = tables_of(args)
    assert "| no fine-tuning | 1 | 50.00 |" in whole
    base = Path(args.output_dir) / "math" / "base"
    shutil.copytree(base / "seed-1", base / "seed-2")  # of a machine that began at the same time
    main(args)
    assert tables_of(args) == whole


def test_the_tables_say_what_they_were_made_with(arguments, performed: list[Step]) -> None:
    args = arguments(dtype="float16")
    main(args)
    assert "Model: `GSAI-ML/LLaDA-8B-Instruct` (configurations `llada_instruct`), evaluated in float16." in tables_of(
        args
    )
    assert "Not the paper's" not in tables_of(args)
    assert "arguments" not in tables_of(args)
    changes = {"train_arguments": "--rank 8 --revision=a", "evaluation_arguments": "--limit=8"}
    other = arguments(
        output_dir=f"{args.output_dir}-2",
        pretrained_model_name_or_path="x/y",
        method_arguments=["lora: --learning_rate 2e-4"],
        **changes,
    )
    main(other)
    assert "Model: `x/y`, revision `a` (configurations `llada_instruct`), evaluated in bfloat16." in tables_of(other)
    assert "Further arguments of evaluation: `--limit 8`" in tables_of(other)
    assert "Further arguments of training: `--rank 8 --revision a`" in tables_of(other)
    assert "Further arguments of training LoRA: `--learning_rate 2e-4`" in tables_of(other)


def test_a_limited_run_says_that_its_figures_are_not_the_papers(arguments, performed: list[Step]) -> None:
    args = arguments(methods=["base"])
    main(args)
    asked = {task: {"original": 395, "effective": 395} for task in MATH}
    asked |= {MATH[0]: {"original": 395, "effective": 8}, MATH[2]: {"original": 1319, "effective": 8}}
    (file,) = Path(args.output_dir).rglob("results_*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "n-samples": asked}))
    main(args)
    told = "**Not the paper's figures: asked were only 8 of 395 questions of AddSub, 8 of 1319 questions of GSM8K.**"
    assert told in tables_of(args)


def test_math_of_some_seeds_says_so(arguments, performed: list[Step]) -> None:
    main(arguments(methods=["base", "lora"]))
    args = arguments(methods=["lora"], seeds=[1, 3], with_math=True)
    main(args)
    rows = [line for line in tables_of(args).splitlines() if line.startswith("|")]
    assert rows[2].endswith("| 25.00 |  |  |")
    assert rows[3].endswith("| 37.00 ± 2.00 | 31.00 ± 1.41 (2 of 3 seeds) |  |")


def test_machines_that_write_the_tables_at_once_do_not_meet(arguments, performed: list[Step]) -> None:
    args = arguments(methods=["base"])
    (Path(args.output_dir) / ".partial-tables.md").mkdir(parents=True)  # what another is writing
    main(args)
    assert "no fine-tuning" in tables_of(args)
