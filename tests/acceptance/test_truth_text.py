"""Records and chat templates that would train something else than they look like are told of, or refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nara_diffusion.dllm import encode_records, records_from_file
from train_scripts.dllm import Arguments, main

MODEL = str(Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny")


def write_records(path: Path, outputs: list[str]) -> str:
    records = ({"instruction": f"upper: {output.lower()}", "output": output, "answer": output} for output in outputs)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Arguments]:
    """A run of one step on so many records of its own, none of them named for validation."""

    def build(records: int, **changes: Any) -> Arguments:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": MODEL,
            "train_file": write_records(tmp_path / "own.jsonl", [f"W{number}" for number in range(records)]),
            "output_dir": str(tmp_path / "run"),
            "target_modules": ["all-linear"],
            "rank": 2,
            "core_hidden_dims": [8, 8],
            "max_train_steps": 1,
            "test_samples": 1,
            "curve_points": 1,
            "gen_length": 8,
        }
        return Arguments(**{**defaults, **changes})

    return build


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)


@pytest.mark.parametrize(
    ("records", "given", "trained", "validated"),
    [(130, None, 117, 13), (3, None, 2, 1), (1500, None, 1372, 128), (130, 65, 65, 65), (130, 20, 110, 20)],
)
def test_a_tenth_of_the_records_is_held_out_and_128_at_most(
    arguments, caplog: pytest.LogCaptureFixture, records: int, given: int | None, trained: int, validated: int
) -> None:
    with caplog.at_level(logging.INFO):
        main(arguments(records, **({} if given is None else {"validation_samples": given})))
    (facts,) = [message for message in caplog.messages if message.startswith("adapter: ")]
    assert f"from {trained} records" in facts
    assert f"validation: {validated} records, held out of the training data" in facts


@pytest.mark.parametrize(("records", "given", "left"), [(130, 128, 2), (130, 66, 64), (20, 30, 0), (1, None, 0)])
def test_holding_out_more_than_is_left_to_train_on_is_refused(
    arguments, records: int, given: int | None, left: int
) -> None:
    args = arguments(records, validation_samples=given)
    message = rf"^{records} training records can't spare \d+ for validation, which leaves {left} to train on: lower val"
    with pytest.raises(ValueError, match=message):
        main(args)
    assert not Path(args.output_dir).exists()


def test_an_end_token_inside_an_answer_is_warned_of(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = ["AB", "AB<|endoftext|>CD", "EF<|endoftext|> <|endoftext|>\n", "<|endoftext|>G"]
    for template in (tokenizer.chat_template, None):
        caplog.clear()
        tokenizer.chat_template = template
        encode_records(records_from_file(write_records(tmp_path / "own.jsonl", outputs)), tokenizer, max_length=500)
        (message,) = [message for message in caplog.messages if "the end token" in message]
        assert "2 of 4 records have the end token '<|endoftext|>' inside their output" in message
        assert "'AB<|endoftext|>CD'" in message


def test_a_template_that_adds_text_with_the_generation_prompt_alone_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    records = records_from_file(write_records(tmp_path / "own.jsonl", ["AB", "CDE"]))
    expected = encode_records(records, tokenizer, max_length=64).rows["input_ids"][:]
    kept = tokenizer.chat_template
    tokenizer.chat_template = str(kept) + "{% if add_generation_prompt %}<think>\n\n</think>{% endif %}"
    message = (
        r"begins an answer with '.*<think>\\n\\n</think>' as generation prompt.* the end of the turn can't be told"
    )
    with pytest.raises(ValueError, match=message):
        encode_records(records, tokenizer, max_length=64)
    tokenizer.chat_template = kept
    assert encode_records(records, tokenizer, max_length=64).rows["input_ids"][:] == expected
