"""Records and chat templates that would train something else than they look like are told of, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nara_diffusion.dllm import encode_records, read_records
from nara_diffusion.dllm.records import load_records
from nara_diffusion.dllm.text_arguments import Arguments

MODEL = str(Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny")


def write_records(path: Path, outputs: list[str]) -> str:
    records = ({"instruction": f"upper: {output.lower()}", "output": output, "answer": output} for output in outputs)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def divided(folder: Path, records: int, validation_samples: int | None) -> tuple[Dataset, Dataset, Dataset]:
    """What a run on so many records trains, validates and tests on, if it names a training file alone."""
    train_file = write_records(folder / "own.jsonl", [f"W{number}" for number in range(records)])
    data = {"train_file": train_file, "validation_samples": validation_samples}
    return load_records(Arguments(pretrained_model_name_or_path=MODEL, **data))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)


@pytest.mark.parametrize(
    ("records", "given", "held"), [(130, None, 13), (3, None, 1), (1500, None, 128), (130, 65, 65), (130, 20, 20)]
)
def test_a_tenth_of_the_records_is_held_out_and_128_at_most(
    tmp_path: Path, records: int, given: Any, held: int
) -> None:
    train, validation, test = divided(tmp_path, records, given)
    assert (len(train), len(validation), len(test)) == (records - held, held, held)
    assert len({*train["output"], *validation["output"]}) == records  # none is in both
    assert validation["output"][:] == test["output"][:]


@pytest.mark.parametrize(("records", "given", "left"), [(130, 128, 2), (130, 66, 64), (20, 30, 0), (1, None, 0)])
def test_holding_out_more_than_is_left_is_refused(tmp_path: Path, records: int, given: int | None, left: int) -> None:
    remedy = "lower validation_samples, or give" if records > 1 else "give"
    message = rf"^training records: {records}, of which \d+ can't be spared for validation, since .* {left}: {remedy}"
    with pytest.raises(ValueError, match=message):
        divided(tmp_path, records, given)


def test_an_end_token_inside_an_answer_is_warned_of(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = ["AB", "AB<|endoftext|>CD", "EF<|endoftext|> <|endoftext|>\n", "<|endoftext|>G"]
    for template in (tokenizer.chat_template, None):
        caplog.clear()
        tokenizer.chat_template = template
        encode_records(read_records(write_records(tmp_path / "own.jsonl", outputs)), tokenizer, max_length=500)
        (message,) = [message for message in caplog.messages if "the end token" in message]
        assert "records: 2 of 4 outputs have the end token '<|endoftext|>' inside them" in message
        assert "answers 'upper: ab<|endoftext|>cd'" in message


def test_a_template_that_adds_text_with_the_generation_prompt_alone_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    records = read_records(write_records(tmp_path / "own.jsonl", ["AB", "CDE"]))
    expected = encode_records(records, tokenizer, max_length=64).rows["input_ids"][:]
    kept = tokenizer.chat_template
    tokenizer.chat_template = str(kept) + "{% if add_generation_prompt %}<think>\n\n</think>{% endif %}"
    message = (
        r"begins an answer with '.*<think>\\n\\n</think>' as generation prompt.* the end of the turn can't be found"
    )
    with pytest.raises(ValueError, match=message):
        encode_records(records, tokenizer, max_length=64)
    tokenizer.chat_template = kept
    assert encode_records(records, tokenizer, max_length=64).rows["input_ids"][:] == expected
