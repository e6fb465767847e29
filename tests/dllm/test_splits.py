"""What is trained on and what is measured on: equal rows never stand on both sides unseen."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from nara_diffusion.dllm import encode_records, read_records
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.text_data import load_records, without_held_out
from nara_diffusion.dllm.train import main
from tests.acceptance._commands import results
from tests.acceptance._runs import text_arguments
from tests.acceptance._text import word_tokenizer

TOKENIZER = word_tokenizer(40, chat=True)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered(*numbers: int) -> list[dict[str, str]]:
    return [{"instruction": f"w{i}", "output": f"W{i}"} for i in numbers]


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def split(file: Path, **options: Any) -> tuple[Dataset, Dataset, Dataset]:
    return load_records(Arguments(pretrained_model_name_or_path="none", train_file=str(file), **options))


def test_copies_of_held_out_records_are_not_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, held_out, _ = split(write(tmp_path / "own.jsonl", *numbered(*[*range(10, 30)] * 4)))
    validation_answers = set(held_out["output"])
    assert len(held_out) == 8
    training, validation = (encode_records(part, TOKENIZER, max_length=64) for part in (train, held_out))
    remaining = without_held_out(training, validation).rows
    copies = 4 * len(validation_answers) - 8
    assert sorted(remaining["answer"]) == sorted(
        [f"W{i}" for i in range(10, 30) if f"W{i}" not in validation_answers] * 4
    )
    assert caplog.messages == [f"training data: {copies} of 72 rows equal held-out ones and are left out"]


def test_split_losing_most_records_as_copies_is_refused(tmp_path: Path) -> None:
    records = split(write(tmp_path / "own.jsonl", *numbered(*[*range(10, 30)] * 12)))[:2]
    training, validation = (encode_records(part, TOKENIZER, max_length=64) for part in records)
    with pytest.raises(ValueError, match=r"training data: \d+ of 216 rows of tokens .* remove the copies"):
        without_held_out(training, validation)


@pytest.mark.parametrize("seed", [0, 5])
def test_split_of_different_records_is_that_of_datasets(tmp_path: Path, seed: int) -> None:
    """And so that of earlier versions, whose runs can be resumed."""
    file = write(tmp_path / "own.jsonl", *numbered(*range(130)))
    train, validation, _ = split(file, seed=seed)
    records: Any = read_records(file)
    expected = records.add_column("number", range(130)).train_test_split(test_size=13, seed=seed)
    assert list(train) == list(expected["train"])
    assert list(validation) == list(expected["test"])


def test_rows_equal_only_after_encoding_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Unknown words are one token, and a conversation can begin as another one does."""
    files = {
        "train": [
            chat("w6", "w7"),
            chat("w6", "w7", "w8", "w9"),
            chat("unknown", "w9"),
            chat("w1", "w2"),
            chat("w1", "w3"),
        ],
        "held": [chat("w6", "w7"), chat("other", "w9")],
    }
    training, held_out = (
        encode_records(read_records(write(tmp_path / name, *some)), TOKENIZER, max_length=64, train_on="all")
        for name, some in files.items()
    )
    remaining = without_held_out(training, held_out).rows
    assert (remaining["record"][:], remaining["answer"][:]) == ([1, 3, 4], ["w9", "w2", "w3"])
    assert "training data: 3 of 6 rows equal held-out ones and are left out" in caplog.messages
    with pytest.raises(ValueError, match="2 of 2 rows of tokens equal held-out ones"):
        without_held_out(held_out, held_out)


def test_files_repeating_training_rows_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    train = numbered(*range(8))
    data: dict[str, Any] = {"train_file": write(tmp_path / "a.jsonl", *train)}
    data |= {"validation_file": write(tmp_path / "b.jsonl", *train, *numbered(9))}
    data |= {"test_file": write(tmp_path / "c.jsonl", *train[:2])}
    options: dict[str, Any] = {"max_train_steps": 1, "checkpointing_steps": None, "curve_points": 1}
    with caplog.at_level(logging.INFO):
        main(text_arguments(tmp_path, **data, **options))
    messages = [f"{count} rows are training rows too" for count in ("8 of 9 validation", "2 of 2 test")]
    begins = next(i for i, message in enumerate(caplog.messages) if "optimizer steps" in message)
    card, printed = (tmp_path / "run" / "README.md").read_text(), capsys.readouterr().out
    for sentence in messages:
        assert any(sentence in message for message in caplog.messages[:begins])
        assert sentence in card[: card.index("exact match (n")]
        assert sentence in printed
    assert [any(s in one for one in results(tmp_path / "run")["warnings"]) for s in messages] == [True, True]
