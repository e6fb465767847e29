"""Text data as people have it: forms, files that change no text, conversations, the cache, and how a run resumes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from nara_diffusion.dllm import encode_records, read_records
from nara_diffusion.dllm.data import encoding
from nara_diffusion.dllm.data.collator import GlobalBatchStream
from nara_diffusion.dllm.data.records import load_records
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.train import main, shipped_run
from tests.acceptance._commands import fresh_accelerate
from tests.acceptance._runs import TEXT, text_arguments
from tests.acceptance._tokenizers import SPECIAL, word_tokenizer

END, PAD, USER, BOT, TURN = (SPECIAL.index(f"<{name}>") for name in ("end", "pad", "user", "bot", "turn"))
PAIR = {"instruction": "w7", "input": "", "output": "w8", "answer": "w8"}
CHAT = [("user", "w6"), ("assistant", "w7"), ("user", "w8"), ("assistant", "w9 w10")]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def messages(*turns: tuple[str, str], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: who, content: text} for who, text in turns]


@pytest.mark.parametrize(
    ("record", "read", "form"),
    [
        ({"instruction": "w7", "input": "w6", "output": "w8"}, PAIR | {"input": "w6"}, "instruction, input, output"),
        ({"prompt": "w7", "completion": "w8"}, PAIR, "prompt as instruction, completion as output"),
        ({"prompt": "w7", "response": "w8", "id": 3}, PAIR, "prompt as instruction, response as output"),
        ({"question": "w7", "answer": "w8"}, PAIR, "question as instruction, answer as output, answer"),
        ({"messages": messages(("user", "w7"), ("assistant", "w8"))}, PAIR | {"turns": []}, "messages"),
        (
            {"conversations": messages(("human", "w7"), ("gpt", "w8"), role="from", content="value")},
            PAIR | {"turns": []},
            "conversations as messages",
        ),
        ({"text": "w7 w8"}, {"instruction": "", "input": "", "output": "w7 w8", "answer": "w7 w8"}, "text"),
    ],
)
def test_form_of_a_record_is_recognised_and_said(tmp_path: Path, record: Any, read: Any, form: str) -> None:
    file = write(tmp_path / "own.jsonl", record)
    records = read_records(file)
    assert list(records) == [read]
    assert records.info.description == f"{file} (fields {form})"


TEXTS = ["1.50", "007", "2024-01-02", "2024-01-02 03:04:05", "1e3", "true", "null", " x\u2028y ", '"']


@pytest.mark.parametrize(
    "name", ["own.jsonl", "own.json", "own.jsonl.gz", "own.json.gz", "own.parquet", "own[1].jsonl", "bom.jsonl"]
)
def test_texts_are_read_as_they_are_whatever_they_look_like(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": text, "completion": text} for text in TEXTS]
    for start in range(0, len(rows), 3):  # a column of dates alone is where readers guess
        part, file = rows[start : start + 3], tmp_path / str(start) / name
        file.parent.mkdir()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in part)
        content = (lines if ".jsonl" in name else json.dumps(part, indent=1)).encode()
        if name.endswith("parquet"):
            Dataset.from_list(part).to_parquet(file)
        else:
            content = b"\xef\xbb\xbf" * name.startswith("bom") + content
            file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert [row["output"] for row in read_records(file)] == [row["completion"] for row in part]  # type: ignore[index]


def test_numbers_are_texts_as_the_file_writes_them(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(
        "".join(f'{{"question": "q", "answer": {value}}}\n' for value in ("1.50", "18", '"x"', "true", "1e3"))
    )
    assert read_records(tmp_path / "own.jsonl")["answer"][:] == ["1.50", "18", "x", "true", "1e3"]


@pytest.mark.parametrize(
    ("output", "named"), [("NaN", "its output, field 'output', is missing"), ('"a \\ud83d b"', "half a character")]
)
def test_output_that_is_no_text_is_refused_with_its_record(tmp_path: Path, output: str, named: str) -> None:
    lines = ['{"instruction": "q", "output": "whole"}', f'{{"instruction": "q", "output": {output}}}']
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"record 2 of .*own\.jsonl.*{named}"):
        read_records(tmp_path / "own.jsonl")


def test_limit_counts_records_and_not_blank_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": "q", "output": str(i)}) for i in range(4)]
    (tmp_path / "own.jsonl").write_text("\n\n\n".join(lines))
    assert read_records(tmp_path / "own.jsonl", limit=3)["output"][:] == ["0", "1", "2"]


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "\ufeff"])
def test_file_without_records_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(ValueError, match=r"own\.json holds no records"):
        read_records(tmp_path / "own.json")


def test_folder_and_names_that_begin_as_paths_are_not_asked_of_the_hub(tmp_path: Path, monkeypatch) -> None:
    asked: list[Any] = []

    def load(path: str, **options: Any) -> Dataset:
        asked.append((path, options))
        return Dataset.from_list([{"prompt": "a", "completion": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("data.jsonl", "owner/data.json.gz", "./none", "../none", "/none", "~/none"):
        with pytest.raises(ValueError, match="there is no file"):
            read_records(name)
    assert asked == []
    (tmp_path / "folder").mkdir()
    assert read_records(tmp_path / "folder").info.description.startswith(f"{tmp_path / 'folder'} (fields")
    assert "owner/data-v1.5 on the Hub" in read_records("owner/data-v1.5").info.description
    read_records("owner/data:test", config="main")
    assert asked == [
        (str(tmp_path / "folder"), {"split": "train", "name": None}),
        ("owner/data-v1.5", {"split": "train", "name": None}),
        ("owner/data", {"split": "test", "name": "main"}),
    ]


@pytest.mark.parametrize(
    ("second", "fields", "named"),
    [
        ({"prompt": "a"}, {}, ["record 2", "output, field 'completion'", "it has prompt", "output_field=NAME"]),
        ({"prompt": "a", "completion": ["b"]}, {}, ["record 2", "field 'completion'", "['b']", "a text or a number"]),
        (["a"], {}, ["record 2", "expected an object"]),
        (
            {"messages": messages(("user", "w7"))},
            {},
            ["record 2", "is missing or empty; it has messages, and the first record decides the form"],
        ),
        ({"prompt": "a"}, {"output": "reply"}, ["record 1", "prompt, completion", "'reply'", "output_field=NAME"]),
    ],
)
def test_record_that_does_not_fit_is_named_with_its_fields_and_flags(tmp_path: Path, second, fields, named) -> None:
    file = write(tmp_path / "own.jsonl", {"prompt": "a", "completion": "b"}, second)
    with pytest.raises(ValueError, match=r"own\.jsonl") as refusal:
        read_records(file, fields)
    assert all(part in str(refusal.value) for part in named)


@pytest.mark.parametrize(
    "turns", [[], "hello", [{"role": "user"}], messages(("assistant", "a")), messages(("user", "a"))]
)
def test_conversation_without_a_question_and_an_answer_is_refused(tmp_path: Path, turns: Any) -> None:
    file = write(tmp_path / "own.jsonl", {"messages": messages(*CHAT)}, {"messages": turns})
    with pytest.raises(ValueError, match=r"record 2 of .*own\.jsonl, field 'messages': expected"):
        read_records(file)


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"prompt": "a", "completion": "b"}, "has no messages, it has prompt, completion: the first record decides"),
        ({"messages": [{"role": "user", "content": ["w7"]}]}, "content has to be a text"),
        ({"messages": messages(("robot", "w6"), *CHAT)}, "role 'robot' is unknown, expected one of system, .*, user"),
    ],
)
def test_record_that_is_no_conversation_of_texts_among_them_is_told_why(tmp_path: Path, second: Any, told: str) -> None:
    file = write(tmp_path / "own.jsonl", {"messages": messages(*CHAT)}, second)
    with pytest.raises(ValueError, match=rf"record 2 of .*own\.jsonl.* {told}"):
        read_records(file)


def test_record_without_a_known_form_is_told_of_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"messages or conversations, .*question\) .*response or answer\), or text"):
        read_records(write(tmp_path / "own.jsonl", {"q": "a"}))


@pytest.mark.parametrize("chat", [True, False])
def test_error_in_a_record_that_was_held_out_has_its_number_in_the_file(tmp_path: Path, chat: bool) -> None:
    many = [{"messages": messages(*CHAT)} for _ in range(12)]
    file = write(tmp_path / "own.jsonl", *many)
    args = Arguments(pretrained_model_name_or_path="none", train_file=str(file))
    held = load_records(args)[1]["number"][0]
    many[held] = {"messages": messages(("user", "w6"), ("assistant", "w7"), ("user", "<mask> w20"), CHAT[1])}
    write(file, *many)
    told = r" has '<mask>' in its text, and so holds the mask" if chat else r": the conversation .* … needs a chat"
    with pytest.raises(ValueError, match=rf"^record {held + 1} of {file}{told}"):
        encode_records(load_records(args)[1], word_tokenizer(40, chat=chat), max_length=64)


def test_each_data_set_is_warned_of_once_by_its_name(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    def stopped(*_: Any) -> None:
        raise InterruptedError

    turns = messages(*CHAT[:2], ("user", "w" * 60), CHAT[3])
    file = write(tmp_path / "own.jsonl", *[{"messages": messages(*CHAT)}, {"messages": turns}] * 12)
    monkeypatch.setattr("nara_diffusion.dllm.train.FineTuning.train", stopped)
    with pytest.raises(InterruptedError):
        main(text_arguments(tmp_path, train_file=file, validation_file=file, test_file=None, max_length=64))
    fresh_accelerate()
    found = [message.partition(":")[0] for message in caplog.messages if "12 of 24 records are dropped" in message]
    assert found == ["training data", "validation data"]


def test_late_answers_whose_prompts_fill_the_length_are_counted(tmp_path: Path, caplog: Any) -> None:
    long = {"messages": messages(*CHAT[:2], ("user", "w8 " * 60), CHAT[3])}
    records = read_records(write(tmp_path / "own.jsonl", {"messages": messages(*CHAT)}, long, long))
    rows = encode_records(records, word_tokenizer(40, chat=True), max_length=64, train_on="all").rows
    assert rows["record"][:] == [0, 0, 1, 2]
    assert "left out likewise: 2 late answers of other conversations" in caplog.text


def test_own_records_without_a_model_are_told_that_they_teach_the_shipped_toy(caplog: Any) -> None:
    with caplog.at_level("INFO"):
        assert "train_file" not in shipped_run({"train_file": "own.jsonl"})
        assert "train_file" in shipped_run({})
    (message,) = caplog.messages
    assert shipped_run({})["max_train_steps"] == 400
    assert message.startswith("no model was named: your records teach ")
    assert "llada-tiny, a toy of 64 positions" in message
    assert "its own settings (max_train_steps 400, train_batch_size 32, learning_rate 0.01, gen_length 12" in message


def test_given_names_choose_the_form(tmp_path: Path) -> None:
    file = write(tmp_path / "own.jsonl", {"messages": [], "q": "w7", "r": "w8", "text": "w9", "said": messages(*CHAT)})
    assert list(read_records(file, {"instruction": "q", "output": "r"})) == [PAIR]
    assert read_records(file, {"text": "text"})["output"][:] == ["w9"]
    assert read_records(file, {"messages": "said"})["output"][:] == ["w9 w10"]


def test_each_answer_of_a_conversation_ends_a_row_with_everything_before_it(tmp_path: Path) -> None:
    file = write(
        tmp_path / "own.jsonl", {"messages": messages(*CHAT, ("user", "w11"))}, {"messages": messages(*CHAT[:2])}
    )
    tokenizer = word_tokenizer(40, chat=True)
    records = read_records(file)
    first = [USER, 6, TURN, BOT, 7, TURN, END]
    second = [USER, 6, TURN, BOT, 7, TURN, USER, 8, TURN, BOT, 9, 10, TURN, END]
    last = encode_records(records, tokenizer, max_length=64).rows
    assert last["input_ids"][:] == [second, first]
    assert last["prompt_length"][:] == [10, 4]
    every = encode_records(records, tokenizer, max_length=64, train_on="all").rows
    assert every["input_ids"][:] == [first, second, first]
    assert every["prompt_length"][:] == [4, 10, 4]
    assert [every[name][:] for name in ("instruction", "answer", "record")] == [
        ["w6", "w8", "w6"],
        ["w7", "w9 w10", "w7"],
        [0, 0, 1],
    ]


def test_system_message_stands_in_the_prompt_and_needs_a_template(tmp_path: Path) -> None:
    file = write(tmp_path / "own.jsonl", {"messages": messages(("system", "w20"), *CHAT[:2])})
    rows = encode_records(read_records(file), word_tokenizer(40, chat=True), max_length=64).rows
    assert rows["input_ids"][:] == [[BOT, 20, TURN, USER, 6, TURN, BOT, 7, TURN, END]]  # the template's other role
    with pytest.raises(ValueError, match=r"w20.*needs a chat template"):
        encode_records(read_records(file), word_tokenizer(40, chat=False), max_length=64)


def test_text_has_no_prompt_but_bos(tmp_path: Path) -> None:
    tokenizer, file = word_tokenizer(40, chat=True), write(tmp_path / "own.jsonl", {"text": "w7 w8"})
    for bos, prompt in (None, []), ("<bot>", [BOT]):
        tokenizer.bos_token = bos
        (row,) = encode_records(read_records(file), tokenizer, max_length=64).rows
        assert (row["input_ids"], row["prompt_length"]) == ([*prompt, 7, 8, END], len(prompt))  # type: ignore[index]


def conversations(tmp_path: Path, count: int = 12) -> Dataset:
    turns = [
        messages(*[(("user", "assistant")[j % 2], f"w{6 + j}") for j in range(2 + 2 * (i % 4))]) for i in range(count)
    ]
    file = write(tmp_path / "many.jsonl", *[{"messages": one} for one in turns])
    return encode_records(read_records(file), word_tokenizer(40, chat=True), max_length=64, train_on="all").rows


def test_each_pass_draws_one_answer_of_each_conversation(tmp_path: Path) -> None:
    rows, passes = conversations(tmp_path), 300
    stream = GlobalBatchStream(rows, seed=3, global_batch=4)
    assert len(stream.samples) == 12
    drawn: Counter[tuple[int, int]] = Counter()
    for epoch in range(passes):
        part = [stream[position] for position in range(12 * epoch, 12 * (epoch + 1))]
        assert sorted(row["record"] for row in part) == list(range(12))
        drawn.update((row["record"], len(row["input_ids"])) for row in part)
    assert len(drawn) == len(rows) == 3 * (1 + 2 + 3 + 4)
    for (record, _), times in drawn.items():  # each as often as any other, within 5 standard deviations
        share = 1 / (1 + record % 4)
        assert abs(times - share * passes) <= 5 * (passes * share * (1 - share)) ** 0.5


def test_stream_begun_anywhere_and_in_any_process_gives_the_same_rows(tmp_path: Path) -> None:
    rows = conversations(tmp_path)
    whole = [GlobalBatchStream(rows, seed=3, global_batch=4)[position] for position in range(60)]
    resumed = GlobalBatchStream(rows, seed=3, global_batch=4)
    assert [resumed[position] for position in range(29, 60, 2)] == whole[29::2]
    for first in range(0, 60, 4):
        batch = whole[first : first + 4]
        assert {row["longest"] for row in batch} == {max(len(row["input_ids"]) for row in batch)}
    other = GlobalBatchStream(rows, seed=4, global_batch=4)
    assert [other[position]["input_ids"] for position in range(60)] != [row["input_ids"] for row in whole]


def test_rows_come_from_the_cache_until_file_tokenizer_or_settings_change(tmp_path: Path, monkeypatch) -> None:
    calls = []
    whole = encoding._Encoder.__call__
    monkeypatch.setattr(encoding._Encoder, "__call__", lambda *parts: calls.append(1) or whole(*parts))
    file = write(tmp_path / "own.jsonl", *[{"prompt": f"w{i}", "completion": "w8"} for i in range(7, 20)])

    def encoded(max_length: int = 64, size: int = 40) -> list[list[int]]:
        return encode_records(read_records(file), word_tokenizer(size, chat=True), max_length=max_length).rows[
            "input_ids"
        ][:]

    first = encoded()
    assert (encoded(), len(calls)) == (first, 1)
    assert (len(encoded(max_length=6)[0]), len(calls)) == (6, 2)
    encoded(size=41)
    assert len(calls) == 3
    os.utime(write(file, {"prompt": "w20", "completion": "w8"}), (1, 1))
    assert (encoded(), len(calls)) == ([[USER, 20, TURN, BOT, 8, TURN, END]], 4)


def test_digest_is_of_the_tokens_and_of_where_rows_answers_and_records_begin(tmp_path: Path) -> None:
    file = write(tmp_path / "own.jsonl", *[{"prompt": f"w{i % 20 + 6}", "completion": "w8"} for i in range(2500)])
    records, tokenizer = read_records(file), word_tokenizer(40, chat=True)
    encoded = encode_records(records, tokenizer, max_length=64)
    rows = list(encoded.rows)
    columns = (
        [token for row in rows for token in row["input_ids"]],  # type: ignore[index]
        [len(row["input_ids"]) for row in rows],  # type: ignore[index]
        [row["prompt_length"] for row in rows],  # type: ignore[index]
        [row["record"] for row in rows],  # type: ignore[index]
    )
    parts = [hashlib.sha256(b"".join(n.to_bytes(4, "little") for n in column)).digest() for column in columns]
    assert encoded.digest() == hashlib.sha256(b"".join(parts)).hexdigest()
    halves = datasets.concatenate_datasets([records.select(range(1111)), records.select(range(1111, 2500))])
    assert encode_records(halves, tokenizer, max_length=64).digest() == encoded.digest()
    assert encode_records(records, tokenizer, max_length=6).digest() != encoded.digest()


def test_run_takes_the_first_samples_and_the_names_of_data_options(tmp_path: Path) -> None:
    file = write(tmp_path / "own.jsonl", *[{"q": f"q{i}", "r": f"r{i}"} for i in range(100)])
    options = {"data_options": {"instruction_field": "q", "output_field": "r"}, "max_train_samples": 20}
    args = Arguments(pretrained_model_name_or_path="none", train_file=str(file), **options)
    train, validation, test = load_records(args)
    assert (len(train), len(validation)) == (18, 2)
    assert {*train["instruction"], *validation["instruction"]} == {f"q{i}" for i in range(20)}
    assert list(test) == list(validation)
    (tmp_path / "own.json").write_text(json.dumps([{"q": f"q{i}", "r": f"r{i}"} for i in range(100)], indent=1))
    args = Arguments(pretrained_model_name_or_path="none", train_file=str(tmp_path / "own.json"), **options)
    assert list(load_records(args)[0]) == list(train)


def test_run_on_every_answer_of_conversations_resumes_to_the_same_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [("user" if j % 2 == 0 else "assistant", f"word {j}") for j in range(6)]
    many = [{"messages": messages(*turns[: 2 + 2 * (i % 3)])} for i in range(12)]
    data = {"train_file": write(tmp_path / "many.jsonl", *many), "validation_file": None}
    data |= {"test_file": write(tmp_path / "few.jsonl", *many[:2])}
    options: dict[str, Any] = {
        "train_on": "all",
        "max_train_steps": 5,
        "checkpoints_total_limit": None,
        "max_length": 64,
        "trained_padding": "longest",
    }
    with caplog.at_level("INFO"):
        main(text_arguments(tmp_path, **data, **options))
    fresh_accelerate()
    said = f"training data: 11 records of {data['train_file']} (fields messages), train_on all"
    assert any(said in message for message in caplog.messages)
    card = (tmp_path / "run" / "README.md").read_text()
    assert re.search(r"prompt_text\(tokenizer, \[\{'role': 'user', 'content': 'word 0'\}, .*\]\)", card)
    found = (tmp_path / "run" / TEXT).read_bytes()
    (tmp_path / "run" / TEXT).unlink()
    resumed = text_arguments(tmp_path, **data, **options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    main(resumed)
    fresh_accelerate()
    assert (tmp_path / "run" / TEXT).read_bytes() == found
