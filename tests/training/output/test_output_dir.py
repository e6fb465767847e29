"""Folders that hold one run, files that are whole or absent."""

import os
from pathlib import Path

import pytest

from nara_diffusion.training.output.output_dir import check_output_dir, create_output_dir, write_json
from nara_diffusion.utils.atomic_write import atomic_write, atomic_write_folder


def test_without_a_name_each_run_gets_the_next_number(tmp_path) -> None:
    first = create_output_dir(None, "dllm", tmp_path)
    second = create_output_dir(None, "dllm", tmp_path)
    (tmp_path / "dllm-9").mkdir()
    (tmp_path / "dllm-notes").mkdir()
    (tmp_path / "other-30").mkdir()
    third = create_output_dir(None, "dllm", tmp_path)
    assert [folder.name for folder in (first, second, third)] == ["dllm-1", "dllm-2", "dllm-10"]
    assert third.is_dir()


def test_a_named_folder_that_holds_something_is_refused(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("rank: 8\n")
    with pytest.raises(ValueError, match=r"already holds another run or other files \(config.yaml\).*--resume_from"):
        check_output_dir(str(tmp_path))
    check_output_dir(str(tmp_path), "latest")
    check_output_dir(str(tmp_path), str(tmp_path / "checkpoint-2"))
    check_output_dir(str(tmp_path / "new"), str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="already holds another run"):
        check_output_dir(str(tmp_path), str(tmp_path.parent / "other" / "checkpoint-2"))


def test_a_resumed_folder_may_be_named_in_another_way(tmp_path, monkeypatch) -> None:
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check_output_dir(str(tmp_path / "run"), "run/checkpoint-2/")
    check_output_dir("./run", str(tmp_path / "run" / "checkpoint-2"))


def test_a_named_folder_may_be_new_or_empty(tmp_path) -> None:
    check_output_dir(str(tmp_path))
    check_output_dir(str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()
    assert create_output_dir(str(tmp_path / "a" / "b"), "dllm").is_dir()


def test_a_file_is_no_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file: name a folder"):
        check_output_dir(str(tmp_path / "file"))


@pytest.mark.parametrize("resuming", [None, "latest"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, resuming: str | None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"tmp.*/file/run: .*/file is a file: name a folder"):
        check_output_dir(str(tmp_path / "file" / "run"), resuming)
    if Path("/proc").is_dir():  # a place where nobody may write, root neither
        with pytest.raises(ValueError, match=r"--output_dir /proc/run can't be written \(/proc: .*\): name another"):
            check_output_dir("/proc/run", resuming)
    check_output_dir(str(tmp_path / "new" / "run"), resuming)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"n": 1})

    def fail() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == '{\n  "n": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_appears_when_it_is_complete(tmp_path) -> None:
    target = tmp_path / "checkpoint-1"
    with atomic_write_folder(target) as partial:
        (partial / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"

    def fail() -> None:
        with atomic_write_folder(target) as partial:
            (partial / "weights").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (target / "weights").read_text() == "w"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_folder_that_cannot_be_replaced_stays(fails_at: int, tmp_path, monkeypatch) -> None:
    target = tmp_path / "checkpoint-1"
    replace, calls = os.replace, []

    def fails_once(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        replace(source, destination)

    def write(content: str) -> None:
        with atomic_write_folder(target) as partial:
            (partial / "weights").write_text(content)

    write("old")
    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    assert (target / "weights").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]
    write("new")
    assert (target / "weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_folder_that_a_killed_process_has_set_aside_is_kept_until_another_is_complete(tmp_path) -> None:
    target = tmp_path / "checkpoint-1"
    aside = tmp_path / ".partial-old-checkpoint-1"
    aside.mkdir()
    (aside / "weights").write_text("old")

    def write(fail: bool) -> None:
        with atomic_write_folder(target) as partial:
            (partial / "weights").write_text("new")
            if fail:
                raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write(fail=True)
    assert (aside / "weights").read_text() == "old"
    write(fail=False)
    assert (target / "weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]
