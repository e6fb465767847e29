"""An adapter whose output depends on λ, and task files that need no network."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from nara_diffusion.dllm import load_backbone
from tests.acceptance._text import LLADA_TINY, nara

if importlib.util.find_spec("lm_eval") is None:
    collect_ignore_glob = ["test_*.py"]  # they need the extra eval

ROWS = 3 * [  # as many as presets take examples
    {"instruction": "reverse: planet", "answer": "tenalp", "choices": ["tenalp", "planet", "x"], "gold": 0},
    {"instruction": "upper: house", "answer": "HOUSE", "choices": ["HOUSE", "esuoh"], "gold": 0},
    {"instruction": "copy: ab cd", "answer": "ab cd", "choices": ["dc ba", "ab cd"], "gold": 1},
]
TASKS: dict[str, dict[str, Any]] = {
    "tiny_answers": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    },
    "tiny_choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    nara(load_backbone(LLADA_TINY)[0], core_hidden_dims=(8, 8)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of task files on the rows above."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}}}
    shared = {"doc_to_text": "{{instruction}}", "test_split": "test", "metadata": {"version": 1.0}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **data, **task}))
    return str(folder)


@pytest.fixture(autouse=True)
def _own_tasks_and_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading lm-eval's thousands of task files takes longer than everything else here, and lm-eval sets its logger up
    for the whole process, on a stderr that pytest then closes."""

    tasks = pytest.importorskip("lm_eval.tasks")
    build = tasks.TaskManager.__init__

    def without_defaults(self: Any, *args: object, **kwargs: object) -> None:
        build(self, *args, **{**kwargs, "include_defaults": False})

    monkeypatch.setattr(tasks.TaskManager, "__init__", without_defaults)
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)
    yield
    logger = logging.getLogger("lm_eval")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True
