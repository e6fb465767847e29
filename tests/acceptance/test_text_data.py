"""Records become prompt, answer and one end token, with exact boundaries; conversations become rows of a stream."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from nara_diffusion.dllm import AnswerCollator, encode_prompts, encode_records, prompt_text, read_records
from nara_diffusion.dllm.batches import GlobalBatchStream, with_longest
from nara_diffusion.dllm.records import normalized
from tests.acceptance._text import SPECIAL, word_tokenizer

END, PAD, USER, BOT, TURN = (SPECIAL.index(f"<{name}>") for name in ("end", "pad", "user", "bot", "turn"))
TOKENIZER, PLAIN = word_tokenizer(40, chat=True), word_tokenizer(40, chat=False)


def pairs(*texts: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"instruction": question, "output": answer} for question, answer in texts]


def chat(*texts: str, system: str | None = None) -> dict[str, Any]:
    """Turns of user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns if system is None else [{"role": "system", "content": system}, *turns]}


def encoded(records: list[dict[str, Any]], tokenizer: Any = TOKENIZER, max_length: int = 64, **options: Any) -> Dataset:
    return encode_records(normalized(records, source="test"), tokenizer, max_length=max_length, **options).rows


def test_chat_template_frames_prompt_and_answer() -> None:
    first = {"instruction": "w7 w8", "input": "w9", "output": "w10 w11", "answer": "w11"}
    rows = encoded([first, {"instruction": "w12", "output": "  w13 w14 w15", "answer": 7}])
    prompts = [[USER, 7, 8, 9, TURN, BOT], [USER, 12, TURN, BOT]]
    answers = [[10, 11, TURN, END], [13, 14, 15, TURN, END]]  # the turn as the template closes it
    assert rows["input_ids"][:] == [p + a for p, a in zip(prompts, answers, strict=True)]
    assert rows["prompt_length"][:] == [6, 4]
    assert rows["answer"][:] == ["w11", "7"]
    texts = [prompt_text(TOKENIZER, "w7 w8", "w9"), prompt_text(TOKENIZER, "w12")]
    assert encode_prompts(TOKENIZER, texts) == prompts  # what generation starts from


def test_without_a_chat_template_an_answer_follows_alpaca_s_prompt_and_ends_once() -> None:
    head = "Below is an instruction that describes a task"
    more = ", paired with an input that provides further context"
    tail = ". Write a response that appropriately completes the request.\n\n### Instruction:\nw7 w8\n\n"
    assert prompt_text(PLAIN, "w7 w8") == f"{head}{tail}### Response:\n"
    assert prompt_text(PLAIN, "w7 w8", "w9") == f"{head}{more}{tail}### Input:\nw9\n\n### Response:\n"
    words = " ".join(f"w{i}" for i in range(7, 37))  # most words have to be known
    rows = encoded(pairs((words, "w10 w11"), (words, f"{words} <end>")), PLAIN, max_length=99)
    prompt: Any = PLAIN(prompt_text(PLAIN, words), add_special_tokens=False)["input_ids"]
    assert rows["input_ids"][:] == [prompt + answer for answer in ([10, 11, END], [*range(7, 37), END])]
    assert rows["prompt_length"][:] == [len(prompt)] * 2


def test_long_answer_is_cut_and_a_prompt_that_fills_the_length_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    texts = [("w7", "w8 w9"), ("w7", "w8 w9 w10 w11 w12"), ("w7 w7 w7 w7 w7", "w8")]
    with caplog.at_level(logging.WARNING):
        rows = encoded(pairs(*texts), max_length=8)
    assert rows["input_ids"][:] == [[USER, 7, TURN, BOT, 8, 9, TURN, END], [USER, 7, TURN, BOT, 8, 9, 10, 11]]
    (message,) = caplog.messages
    assert message.startswith("records: 1 of 3 records are dropped (their prompts have more than 7 tokens), and 1 of 2")
    long = [*texts[:2], ("w7 w7", "w8 w9 w10"), ("w7 w7 w7", "w8")]  # prompts of 4, 4, 5 and 6 tokens
    assert encoded(pairs(*long), max_prompt_length=5)["record"][:] == [0, 1, 2]


@pytest.mark.parametrize(
    ("padding", "trained"),
    [({"trained_padding": 2}, [4, 8, 3]), ({"trained_padding": "gen_length", "gen_length": 5}, [5, 6, 3])],
)
def test_batch_is_padded_with_end_tokens_of_which_a_number_or_all_up_to_gen_length_are_trained(
    padding: dict[str, Any], trained: list[int]
) -> None:
    rows = [
        {"input_ids": [7, 8, 9, END], "prompt_length": 2},
        {"input_ids": [7, 8, 9, 10, 11, 12, END], "prompt_length": 1},  # longer than gen_length
        {"input_ids": [7, 8, 9, 10, 11, 12, 13, 14], "prompt_length": 5},  # cut: its end is not known
    ]
    batch = AnswerCollator(END, **padding)(rows)
    width = max(length + row["prompt_length"] for length, row in zip(trained, rows, strict=True))
    padded = [row["input_ids"] + [END] * (width - len(row["input_ids"])) for row in rows]
    assert batch["input_ids"].tolist() == padded
    assert batch["prompt_lengths"] == [2, 1, 5]
    assert batch["answer_lengths"] == trained


# ---------------------------------------------------------------------- conversations


def test_each_answer_of_a_conversation_ends_a_row_with_everything_before_it(caplog: pytest.LogCaptureFixture) -> None:
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
    assert "left out likewise: 2 late answers of other conversations" in caplog.text
    turns: Any = records[0]["messages"][:3]
    assert encode_prompts(TOKENIZER, [prompt_text(TOKENIZER, turns)]) == [prompt]  # for generation


def test_system_message_stands_in_the_prompt_and_needs_a_template() -> None:
    records = [chat("w6", "w7", system="w20")]
    ids = [BOT, 20, TURN, USER, 6, TURN, BOT, 7, TURN, END]  # the template's other role
    assert encoded(records)["input_ids"][:] == [ids]
    with pytest.raises(ValueError, match=r"w20.*needs a chat template"):
        encoded(records, PLAIN)


def test_text_has_no_prompt_but_bos() -> None:
    for bos, prompt in (None, []), ("<bot>", [BOT]):
        tokenizer = word_tokenizer(40, chat=True)
        tokenizer.bos_token = bos
        rows = encoded([{"text": "w7 w8"}], tokenizer)
        assert (rows["input_ids"][:], rows["prompt_length"][:]) == ([[*prompt, 7, 8, END]], [len(prompt)])


# ---------------------------------------------------------------------- a run's rows


@pytest.fixture(scope="module")
def conversations() -> Dataset:
    """12 conversations of one to four answers."""
    return encoded([chat(*[f"w{6 + j}" for j in range(2 + 2 * (i % 4))]) for i in range(12)], train_on="all")


def test_each_pass_draws_one_answer_of_each_conversation(conversations: Dataset) -> None:
    passes, stream = 300, GlobalBatchStream(conversations, seed=3, global_batch=4)
    assert len(stream.samples) == 12
    drawn: Counter[tuple[int, int]] = Counter()
    for epoch in range(passes):
        part = [stream[position] for position in range(12 * epoch, 12 * (epoch + 1))]
        assert sorted(row["record"] for row in part) == list(range(12))
        drawn.update((row["record"], len(row["input_ids"])) for row in part)
    assert len(drawn) == len(conversations) == 3 * (1 + 2 + 3 + 4)
    for (record, _), times in drawn.items():  # each as often as any other, within 5 standard deviations
        share = 1 / (1 + record % 4)
        assert abs(times - share * passes) <= 5 * (passes * share * (1 - share)) ** 0.5


def test_stream_begun_anywhere_and_in_any_process_gives_the_same_rows(conversations: Dataset) -> None:
    whole = [GlobalBatchStream(conversations, seed=3, global_batch=4)[position] for position in range(60)]
    resumed = GlobalBatchStream(conversations, seed=3, global_batch=4)
    assert [resumed[position] for position in range(29, 60, 2)] == whole[29::2]
    for first in range(0, 60, 4):
        batch = whole[first : first + 4]
        assert {row["longest"] for row in batch} == {max(len(row["input_ids"]) for row in batch)}
    held_out = with_longest(conversations, 4)[:]
    lengths = [len(ids) for ids in held_out["input_ids"]]
    assert held_out["longest"] == [max(lengths[i - i % 4 :][:4]) for i in range(len(lengths))]
    other = GlobalBatchStream(conversations, seed=4, global_batch=4)
    assert [other[position]["input_ids"] for position in range(60)] != [row["input_ids"] for row in whole]


def test_rows_of_a_cache_are_not_taken_where_file_tokenizer_or_settings_are_others(tmp_path: Path) -> None:
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


def test_digest_is_of_the_tokens_and_of_where_rows_answers_and_records_begin() -> None:
    records = normalized(pairs(*[(f"w{i % 20 + 6}", "w8") for i in range(2500)]), source="test")
    whole = encode_records(records, TOKENIZER, max_length=64)
    tokens = whole.rows["input_ids"][:]
    columns = [[*chain(*tokens)], [*map(len, tokens)], whole.rows["prompt_length"][:], whole.rows["record"][:]]
    parts = [hashlib.sha256(b"".join(n.to_bytes(4, "little") for n in column)).digest() for column in columns]
    assert whole.digest() == hashlib.sha256(b"".join(parts)).hexdigest()
    halves = datasets.concatenate_datasets([records.select(range(1111)), records.select(range(1111, 2500))])
    assert encode_records(halves, TOKENIZER, max_length=64).digest() == whole.digest()
