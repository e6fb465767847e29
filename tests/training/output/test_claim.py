"""Two runs never write into one folder, and a run that was killed keeps nobody out of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from nara_diffusion.training.output.claim import claim_output_dir
from nara_diffusion.training.output.output_dir import CLAIM
from nara_diffusion.training.run import start_run

IN_USE = r"--output_dir .*run is in use by another run, which hasn't ended: wait for it, stop it, or name another"


def test_start_run_in_a_folder_of_a_run_that_loads_is_refused(small_args, tmp_path) -> None:
    """Before either has written anything there."""
    with start_run(small_args(), "small"), pytest.raises(ValueError, match=IN_USE):
        start_run(small_args(), "small")
    assert not (tmp_path / "run").exists()
    with start_run(small_args(), "small") as again:
        assert again.folder == tmp_path / "run"


@pytest.mark.parametrize("named", [True, False])
def test_resume_in_the_folder_of_a_run_that_trains_is_refused(
    small_args, small_run, tmp_path, monkeypatch, named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    output = {"output_dir": str(tmp_path / "run") if named else None}
    refused = []

    def start_another(step: int, loss):
        if step == 3:
            with pytest.raises(ValueError, match="is in use by another run") as error:
                start_run(small_args(**output, resume_from_checkpoint="latest"), "small")
            refused.append(error)
        return loss

    folder = small_run(small_args(**output), start_another).run.folder
    assert refused
    assert CLAIM not in os.listdir(folder)
    small_run(small_args(**output, resume_from_checkpoint="latest"))


def test_a_run_that_fails_leaves_the_folders_that_were_there_and_no_others(small_args, tmp_path, monkeypatch) -> None:
    def fail(**changes) -> None:
        with pytest.raises(RuntimeError), start_run(small_args(**changes), "small"):
            raise RuntimeError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    fail(output_dir="there")
    fail(output_dir="there/a/b")
    fail(output_dir=None)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_the_claim_of_a_killed_process_is_void(tmp_path) -> None:
    code = f"""
from nara_diffusion.training.output.claim import claim_output_dir
claim = claim_output_dir({str(tmp_path / "run")!r}, "small")
print("claimed", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"claimed\n"
        with pytest.raises(ValueError, match=IN_USE):
            claim_output_dir(str(tmp_path / "run"), "small")
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / CLAIM).exists()
    claim_output_dir(str(tmp_path / "run"), "small").release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


def test_folder_that_was_released_is_free_within_the_same_process(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    lock = FileLock(tmp_path / "run" / CLAIM)
    claim = claim_output_dir(str(tmp_path / "run"), "small")
    held = claim._lock
    claim.release()
    assert not held.is_locked
    claim.release()  # harmless
    with lock.acquire(timeout=0):
        claim.release()
        assert (tmp_path / "run" / CLAIM).exists()  # that of somebody else


def test_a_folder_that_was_filled_before_the_claim_is_refused(tmp_path, monkeypatch) -> None:
    """By a run that ended between the first look and the claim."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"already holds another run or other files \(config.yaml\)"):
        claim_output_dir(str(tmp_path / "run"), "small")
    assert [path.name for path in Path(tmp_path / "run").iterdir()] == ["config.yaml"]
