import json
import multiprocessing

import pytest
from quality.results import append, now, provenance, read


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "new folder" / "text.jsonl"
    assert read(path) == []
    append(path, [{"method": "nara", "λ": 0.5}, {"method": "lora"}])
    append(path, [{"method": "dora", "losses": [1.5, None]}])
    assert read(path) == [{"method": "nara", "λ": 0.5}, {"method": "lora"}, {"method": "dora", "losses": [1.5, None]}]
    assert len(path.read_text().splitlines()) == 3


def test_what_records_share_stands_once(tmp_path):
    path = tmp_path / "text.jsonl"
    old = {"commit": "a1", "versions": {"torch": "2.13"}, "hardware": {"cores": 2}, "command": "python x.py"}
    new = old | {"commit": "b2"}
    records = [{"n": 0}, *({"n": n} | old for n in (1, 2)), *({"n": n} | new for n in (3, 4)), {"n": 5} | old]
    for record in records:
        append(path, [record])
    assert read(path) == records
    assert path.read_text().count("versions") == 1
    whole = tmp_path / "whole.jsonl"
    append(whole, records)
    assert whole.read_text() == path.read_text()
    append(path, [{"n": 6}])
    assert read(path) == [*records, {"n": 6}]
    assert path.read_text().count("versions") == 2


def test_lines_of_what_is_shared_hold_what_changes(tmp_path):
    path = tmp_path / "text.jsonl"
    records = [
        {"stage": "dev", "regime": "eps_to_v", "rank": 4, "commit": "a1", "n": 1},
        {"stage": "confirm", "regime": "eps_to_v", "rank": 4, "commit": "a1", "n": 2},
        {"stage": "confirm", "regime": "eps_to_v", "rank": 16, "commit": "a1", "n": 3},
        {"stage": "confirm", "rank": 16, "commit": "a1", "n": 4},
        {"stage": "confirm", "rank": 16, "commit": None, "n": 5},  # where there is no git
    ]
    for record in records:
        append(path, [record])
    assert read(path) == records
    shared = [json.loads(line)["made_with"] for line in path.read_text().splitlines() if "made_with" in line]
    assert shared[1:] == [{"stage": "confirm"}, {"rank": 16}, {"regime": None}, {"commit": None}]


def test_what_a_record_says_itself_counts_before_what_is_shared(tmp_path):
    path = tmp_path / "text.jsonl"
    append(path, [{"n": 1, "commit": "a1"}])
    with path.open("a") as file:
        file.write('{"n": 2, "commit": "b2"}\n')
    assert read(path) == [{"n": 1, "commit": "a1"}, {"n": 2, "commit": "b2"}]


def test_a_line_that_was_never_finished_is_no_record_and_vanishes(tmp_path):
    path = tmp_path / "text.jsonl"
    append(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": 2, "los')
    assert read(path) == [{"a": 1}]
    append(path, [{"a": 3}])
    assert read(path) == [{"a": 1}, {"a": 3}]


def test_other_damage_is_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 is no JSON .*: take the line out"):
        read(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 is '\[1\]', expected a JSON object"):
        read(path)


def test_no_record_holds_what_json_cannot(tmp_path):
    path = tmp_path / "text.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(path, [{"a": 1}, {"loss": float("nan")}])
    assert read(path) == []


def add(path, number):
    for index in range(30):
        append(path, [{"number": number, "index": index, "padding": "x" * 5000}] * 2)


def test_several_processes_may_add_at_once(tmp_path):
    path = tmp_path / "text.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add, args=(path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    records = read(path)
    assert len(records) == 180
    assert all(first == second for first, second in zip(records[::2], records[1::2], strict=True))


def test_records_say_where_they_come_from():
    found = provenance()
    assert set(found) == {"commit", "versions", "hardware"}
    assert found["versions"]["torch"]
    assert found["hardware"]["cores"] >= 1
    assert now().endswith("+00:00")
    json.dumps(found)
