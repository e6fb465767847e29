"""Records of {instruction, input, output, answer} become prompt, answer and one end token, with exact boundaries."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from nara_diffusion.dllm import (
    AnswerCollator,
    encode_prompts,
    encode_records,
    prompt_text,
    read_records,
)
from tests.acceptance._tokenizers import SPECIAL, word_tokenizer

END, PAD, USER, BOT, TURN = (SPECIAL.index(f"<{name}>") for name in ("end", "pad", "user", "bot", "turn"))
RECORDS = [
    {"instruction": "w7 w8", "input": "w9", "output": "w10 w11", "answer": "w11"},
    {"instruction": "w12", "output": "  w13 w14 w15", "answer": 7},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def records(tmp_path: Path, *pairs: tuple[str, str]):
    lines = [json.dumps({"instruction": question, "output": answer}) for question, answer in pairs]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    return read_records(tmp_path / "records.jsonl")


def test_chat_template_frames_prompt_and_answer(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(40, chat=True)
    (tmp_path / "data.jsonl").write_text(LINES)
    rows = encode_records(read_records(tmp_path / "data.jsonl"), tokenizer, max_length=64).rows
    prompts = [[USER, 7, 8, 9, TURN, BOT], [USER, 12, TURN, BOT]]
    answers = [[10, 11, TURN, END], [13, 14, 15, TURN, END]]  # the turn as the template closes it
    assert [row["input_ids"] for row in rows] == [p + a for p, a in zip(prompts, answers, strict=True)]
    assert [row["prompt_length"] for row in rows] == [6, 4]
    assert [row["answer"] for row in rows] == ["w11", "7"]
    texts = [prompt_text(tokenizer, "w7 w8", "w9"), prompt_text(tokenizer, "w12")]
    assert encode_prompts(tokenizer, texts) == prompts  # what generation starts from


def test_turns_of_a_conversation_are_a_prompt_by_the_chat_template() -> None:
    turns = [{"role": role, "content": text} for role, text in [("user", "w7"), ("assistant", "w8"), ("user", "w9")]]
    tokenizer = word_tokenizer(40, chat=True)
    prompt = [USER, 7, TURN, BOT, 8, TURN, USER, 9, TURN, BOT]
    assert encode_prompts(tokenizer, [prompt_text(tokenizer, turns)]) == [prompt]
    with pytest.raises(ValueError, match="needs a chat template"):
        prompt_text(word_tokenizer(40, chat=False), turns)


def test_without_a_chat_template_a_prompt_has_alpaca_s_form(tmp_path: Path) -> None:
    head = "Below is an instruction that describes a task"
    more = ", paired with an input that provides further context"
    tail = ". Write a response that appropriately completes the request.\n\n### Instruction:\nw7 w8\n\n"
    tokenizer = word_tokenizer(40, chat=False)
    assert prompt_text(tokenizer, "w7 w8") == f"{head}{tail}### Response:\n"
    assert prompt_text(tokenizer, "w7 w8", "w9") == f"{head}{more}{tail}### Input:\nw9\n\n### Response:\n"


def test_without_a_chat_template_an_answer_follows_alpaca_s_prompt_and_ends_once(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(7, 37)]  # most words have to be known
    tokenizer = word_tokenizer(40, chat=False)
    texts = [(" ".join(words), "w10 w11"), (" ".join(words), " ".join([*words, "<end>"]))]
    rows = encode_records(records(tmp_path, *texts), tokenizer, max_length=99).rows
    prompt = tokenizer(prompt_text(tokenizer, " ".join(words)), add_special_tokens=False)["input_ids"]
    answers = [[10, 11, END], [*range(7, 37), END]]
    assert [row["input_ids"] for row in rows] == [prompt + answer for answer in answers]
    assert [row["prompt_length"] for row in rows] == [len(prompt)] * 2


def test_long_answer_is_cut_and_a_prompt_that_fills_the_length_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [("w7", "w8 w9"), ("w7", "w8 w9 w10 w11 w12"), ("w7 w7 w7 w7 w7", "w8")]
    with caplog.at_level(logging.WARNING):
        encoded = encode_records(records(tmp_path, *pairs), word_tokenizer(40, chat=True), max_length=8)
    rows = [row["input_ids"] for row in encoded.rows]
    assert rows == [[USER, 7, TURN, BOT, 8, 9, TURN, END], [USER, 7, TURN, BOT, 8, 9, 10, 11]]
    (message,) = caplog.messages
    assert message.startswith("records: 1 of 3 records are dropped, whose prompts have more than 7 tokens, and 1 of 2 ")
    long = [*pairs[:2], ("w7 w7", "w8 w9 w10"), ("w7 w7 w7", "w8")]  # prompts of 4, 4, 5 and 6 tokens
    tokenizer = word_tokenizer(40, chat=True)
    kept = encode_records(records(tmp_path, *long), tokenizer, max_length=64, max_prompt_length=5).rows
    assert kept["record"][:] == [0, 1, 2]


def test_batch_is_padded_with_end_tokens_of_which_a_number_is_trained(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [7, 8, 9, END], "prompt_length": 2},
        {"input_ids": [7, 8, 9, 10, 11, 12, END], "prompt_length": 1},
        {"input_ids": [7, 8, 9, 10, 11, 12, 13, 14], "prompt_length": 5},  # cut: its end is not known
    ]
    batch = AnswerCollator(END, trained_padding=2)(rows)
    assert batch["input_ids"].tolist() == [
        [7, 8, 9, END, END, END, END, END, END],
        [7, 8, 9, 10, 11, 12, END, END, END],
        [7, 8, 9, 10, 11, 12, 13, 14, END],
    ]
    assert batch["prompt_lengths"].tolist() == [2, 1, 5]
    assert batch["answer_lengths"].tolist() == [4, 8, 3]
