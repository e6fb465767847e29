"""Folders that hold one run, files that are whole or absent."""

from pathlib import Path

import pytest

from nara_diffusion.training.output import check_output_dir, create_output_dir, write_json
from nara_diffusion.whole import whole_file, whole_folder


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
        check_output_dir(str(tmp_path), resuming=False)
    check_output_dir(str(tmp_path), resuming=True)


def test_a_named_folder_may_be_new_or_empty(tmp_path) -> None:
    check_output_dir(str(tmp_path), resuming=False)
    check_output_dir(str(tmp_path / "a" / "b"), resuming=False)
    assert not (tmp_path / "a").exists()
    assert create_output_dir(str(tmp_path / "a" / "b"), "dllm").is_dir()


def test_a_file_is_no_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file: name a folder"):
        check_output_dir(str(tmp_path / "file"), resuming=False)


@pytest.mark.parametrize("resuming", [False, True])
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, resuming: bool) -> None:
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
        with whole_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == '{\n  "n": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_appears_when_it_is_complete(tmp_path) -> None:
    target = tmp_path / "checkpoint-1"
    with whole_folder(target) as partial:
        (partial / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"

    def fail() -> None:
        with whole_folder(target) as partial:
            (partial / "weights").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (target / "weights").read_text() == "w"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]
