"""Records become prompt, answer and one end token, with exact boundaries; conversations become rows of a stream."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest

from nara_diffusion.dllm import encode_prompts, encode_records, prompt_text, read_records
from nara_diffusion.dllm.records import normalized
from tests.acceptance._text import SPECIAL, word_tokenizer
from tests.helpers.word_rows import BOT, END, PLAIN, TOKENIZER, TURN, USER, chat, encoded, pairs


def test_long_answer_is_cut_and_long_prompt_dropped(caplog: pytest.LogCaptureFixture) -> None:
    texts = [("w7", "w8 w9"), ("w7", "w8 w9 w10 w11 w12"), ("w7 w7 w7 w7 w7", "w8")]
    with caplog.at_level(logging.WARNING):
        rows = encoded(pairs(*texts), max_length=8)
    assert rows["input_ids"][:] == [[USER, 7, TURN, BOT, 8, 9, TURN, END], [USER, 7, TURN, BOT, 8, 9, 10, 11]]
    (message,) = caplog.messages
    assert message.startswith(
        "records: 1 of 3 records are dropped (their prompts have more than 7 tokens), and 1 of 2 rows"
    )
    long = [*texts[:2], ("w7 w7", "w8 w9 w10"), ("w7 w7 w7", "w8")]  # prompts of 4, 4, 5 and 6 tokens
    assert encoded(pairs(*long), max_prompt_length=5)["record"][:] == [0, 1, 2]


# ---------------------------------------------------------------------- conversations


def test_each_conversation_answer_ends_its_own_row() -> None:
    long = chat("w6", "w7", "w8 " * 60, "w9")
    records = [chat("w6", "w7", "w8", "w9 w10", "w11"), chat("w6", "w7"), long, long]
    prompt = [USER, 6, TURN, BOT, 7, TURN, USER, 8, TURN, BOT]
    first, second = [*prompt[:4], 7, TURN, END], [*prompt, 9, 10, TURN, END]
    last = encoded(records)
    assert last["input_ids"][:] == [second, first]
    assert last["prompt_length"][:] == [10, 4]
    every = encoded(records, train_on="all")
    assert every["input_ids"][:] == [first, second, first, first, first]
    assert every["prompt_length"][:] == [4, 10, 4, 4, 4]
    for name, values in {"instruction": ["w6", "w8", "w6"], "answer": ["w7", "w9 w10", "w7"]}.items():
        assert every[name][:3] == values
    assert every["record"][:] == [0, 0, 1, 2, 3]
    turns: Any = records[0]["messages"][:3]
    assert encode_prompts(TOKENIZER, [prompt_text(TOKENIZER, turns)]) == [prompt]  # for generation


def test_system_message_is_in_prompt_and_needs_template() -> None:
    records = [chat("w6", "w7", system="w20")]
    ids = [BOT, 20, TURN, USER, 6, TURN, BOT, 7, TURN, END]  # the template's other role
    assert encoded(records)["input_ids"][:] == [ids]
    with pytest.raises(ValueError, match="record 1 of test: Cannot use chat template functions"):
        encoded(records, PLAIN)


def test_text_has_no_prompt_but_bos() -> None:
    for bos, prompt in (None, []), ("<bot>", [BOT]):
        tokenizer = word_tokenizer(40, chat=True)
        tokenizer.bos_token = bos
        rows = encoded([{"text": "w7 w8"}], tokenizer)
        assert (rows["input_ids"][:], rows["prompt_length"][:]) == ([[*prompt, 7, 8, END]], [len(prompt)])


def test_cached_rows_depend_on_file_tokenizer_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"

    def ids(tokenizer: Any = TOKENIZER, max_length: int = 99) -> list[list[int]]:
        return encode_records(read_records(file), tokenizer, max_length=max_length).rows["input_ids"][:]

    file.write_text("".join(json.dumps(record) + "\n" for record in pairs(*[(f"w{i}", "w8") for i in range(7, 20)])))
    assert ids()[0] == [USER, 7, TURN, BOT, 8, TURN, END]
    assert ids(max_length=6)[0] == [USER, 7, TURN, BOT, 8, TURN]
    assert len(ids(PLAIN)[0]) > 7
    assert ids(word_tokenizer(10, chat=True))[-1] == [USER, SPECIAL.index("<unk>"), TURN, BOT, 8, TURN, END]
    file.write_text(json.dumps(*pairs(("w20", "w8"))))
    os.utime(file, (1, 1))
    assert ids() == [[USER, 20, TURN, BOT, 8, TURN, END]]


def test_digest_covers_tokens_and_their_boundaries() -> None:
    records = normalized(pairs(*[(f"w{i % 20 + 6}", "w8") for i in range(1100)]), source="test")
    full = encode_records(records, TOKENIZER, max_length=64)
    tokens = full.rows["input_ids"][:]
    columns = [[*chain(*tokens)], [*map(len, tokens)], full.rows["prompt_length"][:], full.rows["record"][:]]
    parts = [hashlib.sha256(b"".join(n.to_bytes(4, "little") for n in column)).digest() for column in columns]
    assert full.digest() == hashlib.sha256(b"".join(parts)).hexdigest()
    halves = datasets.concatenate_datasets([records.select(range(511)), records.select(range(511, 1100))])
    assert encode_records(halves, TOKENIZER, max_length=64).digest() == full.digest()
