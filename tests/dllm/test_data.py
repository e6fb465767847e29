"""Text data as people have it: forms, files that change no text, what is refused, and what a run takes of them."""

from __future__ import annotations

import csv
import gzip
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from nara_diffusion.dllm import encode_records, read_records
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.text_data import load_records
from nara_diffusion.dllm.train import main, shipped_run
from tests.acceptance._runs import text_arguments
from tests.acceptance._text import LLADA_TINY, SPECIAL, word_tokenizer

END, PAD, USER, BOT, TURN = (SPECIAL.index(f"<{name}>") for name in ("end", "pad", "user", "bot", "turn"))
PAIR = {"instruction": "w7", "input": "", "output": "w8", "answer": "w8"}
CHAT = [("user", "w6"), ("assistant", "w7"), ("user", "w8"), ("assistant", "w9 w10")]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def messages(*turns: tuple[str, str], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: who, content: text} for who, text in turns]


def test_form_of_a_record_is_recognised_and_said(tmp_path: Path) -> None:
    forms: list[Any] = [
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
    ]
    for number, (record, read, form) in enumerate(forms):
        file = write(tmp_path / f"{number}.jsonl", record)
        records = read_records(file)
        assert list(records) == [read]
        assert records.info.description == f"{file} (fields {form})"


TEXTS = ["1.50", "007", "2024-01-02", "2024-01-02 03:04:05", "1e3", "true", "null", " x\u2028y ", '"']


FILES = ["own.jsonl", "own.json", "own.jsonl.gz", "own.json.gz", "own.parquet", "own[1].jsonl", "bom.jsonl"]


@pytest.mark.parametrize("name", [*FILES, "own.csv", "own.csv.gz", "bom.csv"])
def test_texts_are_read_unchanged_whatever_they_resemble(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": text, "completion": text} for text in TEXTS]
    for start in range(0, len(rows), 3):  # a column of dates alone is where readers guess
        part, file = rows[start : start + 3], tmp_path / str(start) / name
        file.parent.mkdir()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in part)
        table = StringIO()
        csv.writer(table).writerows([part[0], *(row.values() for row in part)])
        text = lines if ".jsonl" in name else table.getvalue() if ".csv" in name else json.dumps(part, indent=1)
        content = text.encode()
        if name.endswith("parquet"):
            Dataset.from_list(part).to_parquet(file)
        else:
            content = b"\xef\xbb\xbf" * name.startswith("bom") + content
            file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert [row["output"] for row in read_records(file)] == [row["completion"] for row in part]  # type: ignore[index]


def test_numbers_are_texts_as_the_file_writes_them(tmp_path: Path) -> None:
    values = ("1.50", "18", '"x"', "true", "1e3")
    lines = [f'{{"question": "q", "answer": {value}}}' for value in values]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    assert read_records(tmp_path / "own.jsonl")["answer"][:] == [value.strip('"') for value in values]


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "\ufeff"])
def test_file_without_records_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(ValueError, match=r"own\.json holds no records"):
        read_records(tmp_path / "own.json")


def test_paths_are_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    requests: list[Any] = []

    def load(path: str, **options: Any) -> Dataset:
        requests.append((path, options))
        return Dataset.from_list([{"prompt": "a", "completion": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    absent = tmp_path / "absent"
    for name in ("data.jsonl", "owner/data.json.gz", "./absent", "../absent", str(absent), "~/absent-of-nara"):
        with pytest.raises(ValueError, match="there is no file"):
            read_records(name)
    assert requests == []
    (tmp_path / "folder").mkdir()
    assert read_records(tmp_path / "folder").info.description.startswith(f"{tmp_path / 'folder'} (fields")
    assert "owner/data-v1.5 on the Hub" in read_records("owner/data-v1.5").info.description
    read_records("owner/data:test", config="main")
    assert requests == [
        (str(tmp_path / "folder"), {"split": "train", "name": None}),
        ("owner/data-v1.5", {"split": "train", "name": None}),
        ("owner/data", {"split": "test", "name": "main"}),
    ]


def test_missing_values_of_parquet_and_csv_are_refused(tmp_path: Path) -> None:
    """Parquet has NaN for a missing number, which is no text."""
    parquet, table = tmp_path / "own.parquet", tmp_path / "own.csv"
    Dataset.from_dict({"question": ["a", "b"], "answer": [1.5, float("nan")]}).to_parquet(parquet)
    table.write_text("question,answer\na,1.5\nb\n")
    for file in (parquet, table):
        with pytest.raises(ValueError, match=rf"^record 2 of {file}: its output, field 'answer', is missing"):
            read_records(file)


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": '{"text": "café"}', "a.csv": "text\ncafé"}.items():
        for encoding in ("latin-1", "utf-16"):
            (tmp_path / name).write_bytes(text.encode(encoding))
            message = rf"^{tmp_path / name} can't be read: 'utf-8' codec .*: save it as UTF-8$"
            with pytest.raises(ValueError, match=message):
                read_records(tmp_path / name)


def test_files_of_another_form_are_refused_with_remedy(tmp_path: Path) -> None:
    for name, content, message in (
        ("own.csv", "question;answer\na;b, c\n", "its columns are separated by ';': save it with commas"),
        ("own.csv.gz", "question\tanswer\na\tb\n", r"its columns are separated by '\t': save it with commas"),
        ("own.txt", "Once upon a time.\n", 'line 1, .* one whole object, such as {"text": "…"}'),
    ):
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        with pytest.raises(ValueError, match=re.escape(message) if "such as" not in message else message) as refusal:
            read_records(tmp_path / name)
        assert str(tmp_path / name) in str(refusal.value)


@pytest.mark.parametrize("form", ["pairs", "chat", "list"])
def test_first_incomplete_record_is_named(tmp_path: Path, form: str) -> None:
    rows: list[dict[str, Any]] = []
    for answer in ("b", "b", " ", "b", ""):
        rows.append({"prompt": "a", "completion": answer})
        if form == "chat":
            rows[-1] = {"messages": messages(("user", "a"), ("assistant", answer))}
    file = write(tmp_path / "own.jsonl", *rows)
    if form == "list":
        file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"^record 3 of {file}[:,]"):
        read_records(file)


# ---------------------------------------------------------------------- folders, and records of another form


def pairs(*texts: str) -> Dataset:
    return Dataset.from_list([{"prompt": text, "completion": text.upper()} for text in texts])


def outputs(records: Dataset) -> list[str]:
    return records["output"][:]


def test_folder_is_read_by_its_splits(tmp_path: Path) -> None:
    datasets.DatasetDict(train=pairs("c"), test=pairs("d", "e")).save_to_disk(tmp_path / "two")
    files = sorted(tmp_path.rglob("*"))
    assert outputs(read_records(tmp_path / "two")) == ["C"]
    test = read_records(f"{tmp_path}/two:test")
    assert outputs(test) == ["D", "E"]
    assert test.info.description.startswith(f"{tmp_path}/two:test (fields prompt")
    assert sorted(tmp_path.rglob("*")) == files
    with pytest.raises(ValueError, match=f"^{tmp_path}/two:dev can't be read: .*dev"):
        read_records(f"{tmp_path}/two:dev")
    pairs("a").save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=f"^{tmp_path}/one can't be read: .*save_to_disk"):
        read_records(tmp_path / "one")
    file = write(tmp_path / "own.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match=f"there is no file {file}:test"):  # a file has no splits
        read_records(f"{file}:test")


PAIRED, CONVERSED = {"prompt": "a", "completion": "b"}, {"messages": messages(*CHAT)}
NO_CHAT = "field 'messages': expected"


def test_unfitting_record_is_named_with_fields_and_flags(tmp_path: Path) -> None:
    rows: list[Any] = [
        (PAIRED, {"prompt": "a"}, {}, ["output, field 'completion'", "it has prompt", "--output_field NAME"]),
        (PAIRED, {"prompt": "a", "completion": ["b"]}, {}, ["field 'completion'", "['b']", "a text or a number"]),
        (PAIRED, {"prompt": "a", "completion": float("nan")}, {}, ["its output, field 'completion', is missing"]),
        (PAIRED, ["a"], {}, ["expected an object"]),
        (PAIRED, CONVERSED, {}, ["is missing or empty; it has messages, and the first record decides the form"]),
        (PAIRED, {}, {"output": "reply"}, ["record 1", "prompt, completion", "'reply'", "--output_field NAME"]),
        ({"q": "a"}, {}, {}, ["record 1", "messages or conversations, ", "question) ", "response or answer), or text"]),
        (CONVERSED, {"messages": None}, {}, ["has null as its messages: the first record decides"]),
        (CONVERSED, {"messages": "hello"}, {}, [NO_CHAT]),
        (CONVERSED, {"messages": messages(("user", "a"))}, {}, [NO_CHAT]),
        (CONVERSED, {"messages": [{"role": "user", "content": ["w7"]}]}, {}, [NO_CHAT, "content has to be a text"]),
        (CONVERSED, {"messages": messages(("robot", "a"), *CHAT)}, {}, ["role 'robot' is unknown", "system, ", "user"]),
        (CONVERSED, PAIRED, {}, ["has no messages, it has prompt, completion: the first record decides"]),
    ]
    for number, (first, second, fields, named) in enumerate(rows):
        file = write(tmp_path / f"{number}.jsonl", first, second)
        with pytest.raises(ValueError, match=rf"^record [12] of {file}") as refusal:
            read_records(file, fields)
        assert all(part in str(refusal.value) for part in (*named, "" if "record 1" in named else "record 2"))


@pytest.mark.parametrize("chat", [True, False])
def test_held_out_records_error_has_its_file_number(tmp_path: Path, chat: bool) -> None:
    many = [{"messages": messages(("user", f"w{i}"), *CHAT[1:])} for i in range(6, 18)]
    file = write(tmp_path / "own.jsonl", *many)
    args = Arguments(pretrained_model_name_or_path="none", train_file=str(file))
    number = load_records(args)[1]["number"][0]
    many[number] = {"messages": messages(("user", "w6"), ("assistant", "w7"), ("user", "<mask> w20"), CHAT[1])}
    write(file, *many)
    message = r" has '<mask>' in its text, and so holds the mask" if chat else ": Cannot use chat template"
    with pytest.raises(ValueError, match=rf"^record {number + 1} of {file}{message}"):
        encode_records(load_records(args)[1], word_tokenizer(40, chat=chat), max_length=64)


def divided(folder: Path, count: int, validation_samples: int | None) -> tuple[Dataset, Dataset, Dataset]:
    """What a run on so many records trains, validates and tests on, if it names a training file alone."""
    file = write(folder / "own.jsonl", *({"instruction": f"w{i}", "output": f"W{i}"} for i in range(count)))
    options = {"train_file": str(file), "validation_samples": validation_samples}
    return load_records(Arguments(pretrained_model_name_or_path="none", **options))


@pytest.mark.parametrize(("count", "given", "held"), [(130, None, 13), (3, None, 1), (1500, None, 128), (130, 65, 65)])
def test_validation_takes_a_tenth_up_to_128(tmp_path: Path, count: int, given: Any, held: int) -> None:
    train, validation, test = divided(tmp_path, count, given)
    assert (len(train), len(validation), len(test)) == (count - held, held, held)
    assert len({*train["output"], *validation["output"]}) == count  # none is in both
    assert validation["output"][:] == test["output"][:]


@pytest.mark.parametrize(("count", "given", "left"), [(130, 66, 64), (20, 30, 0), (1, None, 0)])
def test_holding_out_more_than_is_left_is_refused(tmp_path: Path, count: int, given: int | None, left: int) -> None:
    remedy = "lower validation_samples, or give" if count > 1 else "give"
    message = rf"^training records: {count}. \d+ can't be spared for validation, since .* {left}: {remedy}"
    with pytest.raises(ValueError, match=message):
        divided(tmp_path, count, given)


def rows_of(folder: Path, tokenizer: Any, *outputs: str, **options: Any) -> Dataset:
    records = [{"instruction": f"upper: {output.lower()}", "output": output} for output in outputs]
    return encode_records(read_records(write(folder / "own.jsonl", *records)), tokenizer, **options).rows


def test_prompts_that_leave_nothing_are_refused_with_flags(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    shortest = rows_of(tmp_path, tokenizer, "AB", max_length=64)["prompt_length"][0]
    for options in {"max_length": shortest}, {"max_length": 64, "max_prompt_length": shortest - 1}:
        message = (
            f"nothing is left of 2 records, .* than {shortest - 1} tokens: raise --max_length, or --max_prompt_length"
        )
        with pytest.raises(ValueError, match=message):
            rows_of(tmp_path, tokenizer, "AB", "ABCDE", **options)
    assert len(rows_of(tmp_path, tokenizer, "AB", "ABCDE", max_length=shortest + 1)) == 1


def test_template_with_text_only_in_prompts_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n\n</think>{% endif %}"
    with pytest.raises(
        ValueError,
        match=r"begins an answer with '.*<think>\\n\\n</think>' in a generation prompt, but .* can't be found",
    ):
        rows_of(tmp_path, tokenizer, "AB", "CDE", max_length=64)


def test_own_records_without_model_warn_of_the_toy(caplog: Any) -> None:
    with caplog.at_level("INFO"):
        assert "train_file" not in shipped_run({"train_file": "own.jsonl"})
        assert "train_file" in shipped_run({})
    toy, settings, advice = caplog.messages
    assert toy.startswith("no model was named: your data teach ")
    assert "llada-tiny, a toy of 64 positions" in toy
    assert settings.startswith("its own settings: max_train_steps 400, train_batch_size 32, learning_rate 0.01, gen_")
    assert advice.startswith("for LLaDA-8B add ")
    assert max(map(len, caplog.messages)) <= 160


def test_given_names_choose_the_form(tmp_path: Path) -> None:
    file = write(tmp_path / "own.jsonl", {"messages": [], "q": "w7", "r": "w8", "text": "w9", "said": messages(*CHAT)})
    assert list(read_records(file, {"instruction": "q", "output": "r"})) == [PAIR]
    assert read_records(file, {"text": "text"})["output"][:] == ["w9"]
    assert read_records(file, {"messages": "said"})["output"][:] == ["w9 w10"]


def test_run_takes_first_samples_and_data_field_names(tmp_path: Path) -> None:
    records, file = [{"q": f"q{i}", "r": f"r{i}"} for i in range(100)], tmp_path / "own.jsonl"
    file.write_text("\n\n\n".join(map(json.dumps, records)))  # blank lines are none
    options = {"instruction_field": "q", "output_field": "r", "max_train_samples": 20}
    args = Arguments(pretrained_model_name_or_path="none", train_file=str(file), **options)
    train, validation, test = load_records(args)
    assert (len(train), len(validation)) == (18, 2)
    assert {*train["instruction"], *validation["instruction"]} == {f"q{i}" for i in range(20)}
    assert list(test) == list(validation)


def test_run_on_all_conversation_answers_says_so(tmp_path: Path, caplog: Any) -> None:
    turns = [("user" if j % 2 == 0 else "assistant", f"word {j}") for j in range(6)]
    many = [{"messages": messages(*turns[: 2 + 2 * (i % 3)])} for i in range(12)]
    long = {"messages": messages(("user", "w" * 60), ("assistant", "a"))}
    data: dict[str, Any] = {"train_file": write(tmp_path / "many.jsonl", *many, long), "test_file": None}
    data |= {"validation_file": write(tmp_path / "few.jsonl", *many[:2], long)}
    data |= {"train_on": "all", "max_train_steps": 1, "max_length": 64, "trained_padding": "longest"}
    with caplog.at_level("INFO"):
        main(text_arguments(tmp_path, **data))
    fact = f"training data: 12 records of {data['train_file']} (fields messages), train_on all"
    assert any(fact in message for message in caplog.messages)
    dropped = [message.partition(" are dropped")[0] for message in caplog.messages if "are dropped" in message]
    assert dropped == ["training data: 1 of 13 records", "validation data: 1 of 3 records"]  # each once
    card = (tmp_path / "run" / "README.md").read_text()
    assert "prompt_text(tokenizer, 'word 0')" in card
