"""JSON files of questions and answers: what is read, and what bad files are told."""

from __future__ import annotations

import gzip
import json
import logging
from decimal import Decimal
from pathlib import Path

import pytest

from nara_diffusion.dllm import FieldNames, records_from_file, records_from_hub
from nara_diffusion.dllm.data.records import normalized

RECORDS = [
    {"instruction": "What is 2 + 3?", "input": "", "output": "2 + 3 = 5.", "answer": "5"},
    {"instruction": "Öffne!", "output": "ja", "answer": 7},
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["list", "indented", "lines", "bom"])
def test_a_list_and_json_lines_are_the_same_records(tmp_path: Path, form: str) -> None:
    lines = "\n".join(json.dumps(record) for record in RECORDS) + "\n\n"
    texts = {
        "list": json.dumps(RECORDS),
        "indented": json.dumps(RECORDS, indent=2),
        "lines": lines,
        "bom": "\ufeff" + lines,
    }
    records = records_from_file(write(tmp_path / "data.json", texts[form]))
    assert list(records) == [
        {"instruction": "What is 2 + 3?", "input": "", "output": "2 + 3 = 5.", "answer": "5"},
        {"instruction": "Öffne!", "input": "", "output": "ja", "answer": "7"},
    ]


def test_fields_may_be_renamed_and_the_answer_may_be_the_output(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", json.dumps({"question": "q", "context": "c", "response": "r"}))
    records = records_from_file(path, FieldNames(instruction="question", input="context", output="response"))
    assert list(records) == [{"instruction": "q", "input": "c", "output": "r", "answer": "r"}]


def test_a_folder_is_read_like_a_data_set_of_the_hub(tmp_path: Path) -> None:
    write(
        tmp_path / "train.jsonl",
        "\n".join(json.dumps(record | {"answer": str(record["answer"])}) for record in RECORDS),
    )
    records = records_from_hub(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert [record["output"] for record in records] == ["2 + 3 = 5.", "ja"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("[]", "holds no records"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": \n', "breaks at line 2, column 17"),
        ('{"instruction": "a", "output": "b"}\n\n"text"\n', 'line 3: expected an object, found "text"'),
        ('[{"instruction": "a", "output": "b"},\n {"instruction" "c"}]', "breaks at line 2, column 17"),
        ('[{"instruction": "a", "output": "b"}, 3]', "record 2: expected an object, found 3"),
        ('{"instruction": "a"}', "record 1 of .*: its output, field 'output', is missing; the record has instruction"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}', "record 2 .*'output', is empty"),
        ('{"output": "b"}', "record 1 .*: its instruction, field 'instruction', is missing"),
        (
            '{"instruction": "a", "output": "b", "answer": "b"}\n{"instruction": "a", "output": "b", "answer": null}',
            "record 2 .*: its answer, field 'answer', is empty",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        records_from_file(write(tmp_path / "data.json", text))


def test_white_space_of_an_output_is_kept(tmp_path: Path) -> None:
    record = {"instruction": "Indent.", "output": "    return 1\n", "answer": " 1 "}
    (row,) = records_from_file(write(tmp_path / "data.jsonl", json.dumps(record)))
    assert (row["output"], row["answer"]) == ("    return 1\n", "1")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b'[{"instruction": "\xff"}]')
    with pytest.raises(ValueError, match=r"data\.json isn't UTF-8 text \(byte 18"):
        records_from_file(tmp_path / "data.json")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*none\.json: pass a JSON or JSON Lines file"):
        records_from_file(tmp_path / "none.json")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_json_lines_end_at_a_line_feed_alone(tmp_path: Path, separator: str) -> None:
    row = {"instruction": "Say it.", "output": f"first{separator}second"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert records_from_file(path)["output"] == [row["output"]] * 2


def test_a_data_set_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the data set .*nowhere \(train\) can't be loaded: "):
        records_from_hub(str(tmp_path / "nowhere"))


GOOD = '{"instruction": "a", "output": "b", "answer": "c"}\n'


@pytest.mark.parametrize("field", ["instruction", "input", "output", "answer"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ('["b", "c"]', r"is a list, \['b', 'c'\]"),
        ('{"b": 1}', r"is an object, \{'b': 1\}"),
        ("NaN", "is nan"),
        ("-Infinity", "is -inf"),
    ],
)
def test_records_from_file_with_a_field_that_is_no_text_names_record_and_field(
    tmp_path: Path, field: str, value: str, found: str
) -> None:
    fields = {"instruction": '"a"', "input": '"i"', "output": '"b"', "answer": '"c"'} | {field: value}
    line = "{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}"
    with pytest.raises(
        ValueError, match=rf"record 2 of .*data\.jsonl: its {field}, field '{field}', {found}: expected"
    ):
        records_from_file(write(tmp_path / "data.jsonl", GOOD + line))


@pytest.mark.parametrize("number", ["7", "1.50", "-0.0", "1e3", "true", "false", "9" * 5000])
def test_records_from_file_with_numbers_keeps_them_as_they_are_written(tmp_path: Path, number: str) -> None:
    line = f'{{"instruction": {number}, "output": {number}, "answer": {number}}}'
    (row,) = records_from_file(write(tmp_path / "data.jsonl", line))
    assert (row["instruction"], row["output"], row["answer"]) == (number, number, number)


def test_normalized_takes_numbers_and_refuses_other_objects() -> None:
    row = {"instruction": 1, "input": True, "output": 2.5, "answer": Decimal("1.10")}
    (record,) = normalized([row], source="test")
    assert record == {"instruction": "1", "input": "true", "output": "2.5", "answer": "1.10"}
    with pytest.raises(ValueError, match=r"record 1 of test: its output, field 'output', is of type bytes"):
        normalized([row | {"output": b"2"}], source="test")
    with pytest.raises(ValueError, match=r"record 1 of test: its answer, field 'answer', is nan"):
        normalized([row | {"answer": float("nan")}], source="test")


@pytest.mark.parametrize("form", ["list", "lines"])
def test_records_from_file_with_a_field_that_stands_twice_names_it(tmp_path: Path, form: str) -> None:
    twice = '{"instruction": "a", "output": "b", "output": "c", "answer": "c"}'
    text = f"[{GOOD}, {twice}]" if form == "list" else GOOD + twice
    with pytest.raises(ValueError, match=r"(record|line) 2: the field 'output' stands twice"):
        records_from_file(write(tmp_path / "data.json", text))


@pytest.mark.parametrize("field", ["instruction", "output"])
def test_records_from_file_with_a_lone_surrogate_names_record_and_field(tmp_path: Path, field: str) -> None:
    line = json.dumps({"instruction": "a", "output": "b", "answer": "c"} | {field: "ab\ud83d c"})
    with pytest.raises(
        ValueError,
        match=rf"record 2 of .*: its {field}, field '{field}', has half a surrogate pair .*U\+D83D.* after 'ab'",
    ):
        records_from_file(write(tmp_path / "data.jsonl", GOOD + line))


def test_records_from_file_with_whole_surrogate_pairs_reads_them(tmp_path: Path) -> None:
    line = '{"instruction": "\\ud83d\\ude00", "output": "b"}'
    assert records_from_file(write(tmp_path / "data.jsonl", line))["instruction"] == ["\U0001f600"]


@pytest.mark.parametrize(
    "text", [json.dumps(RECORDS), "\ufeff" + "\r\n".join(json.dumps(record) for record in RECORDS)]
)
@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.json.gz", "data.jsonl"])
def test_records_from_file_with_gzip_reads_what_is_compressed(tmp_path: Path, text: str, name: str) -> None:
    plain = records_from_file(write(tmp_path / "plain.json", text))
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    assert list(records_from_file(path)) == list(plain)


def test_records_from_file_with_broken_gzip_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    whole = gzip.compress(GOOD.encode() * 1000)
    for broken in (whole[:-20], whole[:40] + bytes(20) + whole[60:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"data\.jsonl\.gz can't be read: "):
            records_from_file(path)


@pytest.mark.parametrize("text", [GOOD + "[" * 100_000 + "]" * 100_000, "[" * 100_000 + "]" * 100_000])
def test_records_from_file_with_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"data\.json.* nests too deep"):
        records_from_file(write(tmp_path / "data.json", text))


@pytest.mark.parametrize("field", ["instruction", "output", "answer"])
@pytest.mark.parametrize("text", ["\u200b", "\x00 \ufeff\n"])
def test_records_from_file_with_nothing_but_invisible_characters_is_empty(
    tmp_path: Path, field: str, text: str
) -> None:
    line = json.dumps({"instruction": "a", "output": "b", "answer": "c"} | {field: text})
    with pytest.raises(ValueError, match=rf"record 2 of .*: its {field}, field '{field}', is empty"):
        records_from_file(write(tmp_path / "data.jsonl", GOOD + line))


@pytest.mark.parametrize("text", ["\U0001fae8", "\ue000", "a\u200bb"])
def test_records_from_file_with_characters_python_does_not_know_keeps_them(tmp_path: Path, text: str) -> None:
    line = json.dumps({"instruction": text, "output": text})
    (row,) = records_from_file(write(tmp_path / "data.jsonl", line))
    assert (row["instruction"], row["output"], row["answer"]) == (text, text, text)


@pytest.mark.parametrize("what", ["input", "answer"])
def test_normalized_with_a_named_field_that_no_record_has_warns(what: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"instruction": "a", "input": "i", "output": "b", "answer": "c"}] * 2
    with caplog.at_level(logging.WARNING):
        normalized(rows, FieldNames(**{what: "mispelt"}), source="test")
    (message,) = caplog.messages
    assert message.startswith(f"no record of test has the field 'mispelt', which was named for its {what}")
    assert "instruction, input, output, answer" in message


def test_normalized_with_optional_fields_left_out_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        normalized([{"instruction": "a", "output": "b"}], source="test")
        normalized([{"q": "a"}, {"q": "a", "i": "b"}], FieldNames("q", "i", "q"), source="test")
    assert caplog.messages == []
