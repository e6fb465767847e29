"""Flags of dllm.py that no other test would miss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from nara_diffusion.dllm import text_report, train
from nara_diffusion.dllm.decoding import Sampling
from nara_diffusion.dllm.kinds.masked_kind import MASKED
from nara_diffusion.dllm.record_forms import TEXTS
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.text_data import load_records
from tests.acceptance._runs import text_arguments


def arguments(**flags: Any) -> Arguments:
    return Arguments(**{"pretrained_model_name_or_path": "none", "train_file": "none"} | flags)


def written(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    "flags",
    [
        {"gen_length": 12, "block_length": 6, "temperature": 0.7, "top_p": 0.9, "cfg_scale": 1.5},
        {"remasking": "entropy", "entropy_bound": 0.1, "confidence_eos_eot_inf": True},
        {"confidence_threshold": 0.8, "logits_eos_inf": True},
        {"factor": 2.0, "remasking": "maskgit_plus"},
    ],
)
def test_generation_has_each_flag(flags: dict[str, Any]) -> None:
    assert arguments(**flags).sampling() == Sampling(**flags)
    assert arguments(generation_steps=4).sampling() == Sampling(steps=4)


def test_fields_are_read_by_their_flags(tmp_path: Path) -> None:
    names = {"instruction_field": "q", "input_field": "more", "output_field": "long", "answer_field": "short"}
    record = {"q": "Add", "more": "2 3", "long": "2 + 3 = 5", "short": "5", "said": "a text"}
    file = written(tmp_path / "own.jsonl", *[record | {"more": f"2 {i}"} for i in range(4)])
    row = load_records(arguments(train_file=file, validation_file=file, **names))[0][1]
    assert [row[name] for name in TEXTS] == ["Add", "2 1", "2 + 3 = 5", "5"]
    (row, *_) = load_records(arguments(train_file=file, validation_file=file, text_field="said"))[0]
    assert (row["instruction"], row["output"]) == ("", "a text")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    file = written(tmp_path / "chats.jsonl", *[{"talk": turns, "messages": "none"}] * 2)
    (row, *_) = load_records(arguments(train_file=file, validation_file=file, messages_field="talk"))[0]
    assert (row["instruction"], row["output"]) == ("hello", "you")


def test_numbers_of_records_are_those_of_the_flags(tmp_path: Path) -> None:
    file = written(tmp_path / "own.jsonl", *[{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)])
    flags = {"max_train_samples": 12, "validation_samples": 5, "test_file": file, "test_samples": 17}
    assert [len(part) for part in load_records(arguments(train_file=file, **flags))] == [7, 5, 17]


def test_hub_dataset_is_read_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(path: str, **options: Any) -> Dataset:
        calls.append((path, options))
        return Dataset.from_list([{"prompt": f"a{i}", "completion": "b"} for i in range(4)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    load_records(arguments(train_file=None, dataset_name="owner/data:test", dataset_config_name="main"))
    assert calls == [("owner/data", {"split": "test", "name": "main"})]


def test_model_is_loaded_by_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(name: str, **options: Any) -> None:
        calls.append(options)
        raise ArithmeticError

    monkeypatch.setattr("nara_diffusion.dllm.text_data.load_backbone", load)
    flags = {"revision": "v2", "mask_token": "[M]"}
    with pytest.raises(ArithmeticError):
        train.main(text_arguments(tmp_path, **flags))
    assert calls[0].items() >= flags.items()


def test_evaluation_has_each_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    sizes: list[int] = []

    def compared(*_: Any, **options: Any) -> Any:
        calls.append(options)
        return SimpleNamespace(generations=[{"correct": True}])

    def curve(model: Any, rows: Any, levels: Any, **options: Any) -> list[float]:
        calls.append(options)
        return [0.5] * len(levels)

    def loss(model: Any, input_ids: Tensor, **_: Any) -> Any:
        sizes.append(len(input_ids))
        return SimpleNamespace(per_sample=input_ids[:, 0], noise_level=input_ids[:, 0])

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"input_ids": torch.full((len(rows), 1), 0.5), "sample_indices": [row["position"] for row in rows]}

    monkeypatch.setattr(text_report, "exact_match", compared)
    kind = replace(MASKED, curve=curve, loss=loss)
    accelerator = SimpleNamespace(device="cpu", num_processes=1, process_index=0, distributed_type="NO")
    args = arguments(extract="number", eval_batch_size=3, curve_points=4)
    run: Any = SimpleNamespace(args=args, accelerator=accelerator, is_main=True, global_batch=2)
    rows = Dataset.from_list([{"instruction": "q"}] * 7)
    base: Any = SimpleNamespace(tokenizer=None, kind=kind, sampling=args.sampling())
    data: Any = SimpleNamespace(validation_rows=rows, test=SimpleNamespace(rows=rows.select([0])), collator=collate)
    evaluation = text_report.Evaluation(run, base, data)
    measured = evaluation.measure(nn.Identity())
    assert calls[0]["extract"] == "number"
    assert [options["batch_size"] for options in calls] == [3, 3]
    assert sizes == [3, 3, 1]
    assert len(measured.curve) == 4
