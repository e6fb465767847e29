"""The paper's experiments without running them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nara_diffusion.harness.paper.plan import DOMAINS, Step
from train_scripts import paper_tables
from train_scripts.paper_tables import PaperArguments

MATH = list(DOMAINS["math"].sets.values())
SCORES = {  # percent on the first set, by (method, seed); the others are 10 below one another
    ("base", 1): 50.0,
    ("lora", 1): 60.0,
    ("lora", 2): 62.0,
    ("lora", 3): 64.0,
    ("nara", 1): 61.0,
    ("nara", 2): 64.0,
    ("nara", 3): 65.0,
}


class Done:
    """What subprocess.run returns of a command that ended well."""

    returncode = 0


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., PaperArguments]:
    for name in ("math_14k.json", "commonsense_170k.json", *(f"{d}/test.json" for d in DOMAINS["math"].test_files)):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")

    def make(**changes: object) -> PaperArguments:
        folders = {"output_dir": str(tmp_path / "out"), "data_dir": str(tmp_path / "data")}
        choice = {"domains": ["math"], "methods": ["base", "lora", "nara"], "seeds": [1, 2, 3]}
        return PaperArguments(**{**folders, **choice, **changes})

    return make


def tables_of(args: PaperArguments) -> str:
    return (Path(args.output_dir) / "tables.md").read_text(encoding="utf-8")


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Steps are noted, and leave what the true ones leave."""
    steps: list[Step] = []

    def perform(step: Step) -> bool:
        steps.append(step)
        if step.title.startswith("train"):
            step.folder.mkdir(parents=True)
            (step.folder / "results.json").write_text("{}")
        else:
            method, seed = step.folder.parts[-3], int(step.folder.parts[-2].removeprefix("seed-"))
            first = SCORES[method, seed]
            results = {task: {"acc,none": (first - 10 * i) / 100, "alias": task} for i, task in enumerate(MATH)}
            if "minerva_math" in step.tasks:
                results["minerva_math"] = {"exact_match,none": 0.1, "math_verify,none": first / 200}
            (step.folder / "nara_dllm").mkdir(parents=True, exist_ok=True)
            (step.folder / "nara_dllm" / "results_2026.json").write_text(json.dumps({"results": results}))
        return True

    monkeypatch.setattr(paper_tables, "perform", perform)
    return steps
