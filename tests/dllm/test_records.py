"""JSON files of questions and answers: what is read, and what bad files are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nara_diffusion.dllm import FieldNames, records_from_file, records_from_hub

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
