"""An adapter whose output depends on λ, and task files that need no network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import load_backbone

if importlib.util.find_spec("lm_eval") is None:
    collect_ignore_glob = ["test_*.py", "paper/test_*.py"]  # they need the extra eval

LLADA_TINY = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny"

GENERATION = {
    "task": "tiny_answers",
    "output_type": "generate_until",
    "doc_to_text": "{{instruction}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
}
CHOICE = {
    "task": "tiny_choices",
    "output_type": "multiple_choice",
    "doc_to_text": "{{instruction}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ROLLING = {
    "task": "tiny_texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{instruction}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
ROWS = [
    {"instruction": "reverse: planet", "answer": "tenalp", "choices": ["tenalp", "planet", "x"], "gold": 0},
    {"instruction": "upper: house", "answer": "HOUSE", "choices": ["HOUSE", "esuoh"], "gold": 0},
    {"instruction": "copy: ab cd", "answer": "ab cd", "choices": ["dc ba", "ab cd"], "gold": 1},
]


def make_adapter(folder: Path, **settings: object) -> Path:
    """A NaRA on the shipped model, disturbed so that base, C = I and every λ give different outputs."""
    model, _ = load_backbone(str(LLADA_TINY))
    config = NaraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], core_hidden_dims=(8, 8), core_scale=1.0, **settings
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def _loaded(adapter: Path) -> Any:
    from .harness_calls import load  # needs the extra eval

    return load(adapter)


@pytest.fixture
def harness(_loaded: Any) -> Any:
    """The `NaraDLLM` of a module's tests, with the settings that it was loaded with."""
    from .harness_calls import as_loaded

    return as_loaded(_loaded)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files on the rows above."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.json"
    data.write_text(json.dumps(ROWS))
    for task in (GENERATION, CHOICE, ROLLING):
        settings = {
            **task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of one test are not those of the next."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
