"""Programs run apart from us, and not for longer, larger or further than they may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nara_diffusion.harness.tasks import execution
from nara_diffusion.harness.tasks.execution import Limits, Outcome, run_program
from tests.helpers.patience import LAST_RESORT, wait_until

SMALL = Limits(seconds=LAST_RESORT, memory=2**30, file_size=2**16)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")


def test_a_program_that_comes_to_its_end_passes() -> None:
    assert run_program("assert sum([1, 2]) == 3").passed


def test_an_error_fails_and_is_told() -> None:
    outcome = run_program("def f():\n    return 1\n\nassert f() == 2, 'f gives 1'")
    assert not outcome.passed
    assert outcome.reason == "AssertionError: f gives 1"


def test_what_is_no_python_fails() -> None:
    outcome = run_program("The answer is 3.")
    assert not outcome.passed
    assert "SyntaxError" in outcome.reason


@pytest.mark.parametrize("way_out", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_before_the_tests_is_no_pass(way_out: str) -> None:
    outcome = run_program(f"{way_out}\nassert False")
    assert not outcome.passed
    assert outcome.reason == "ended early, with status 0"


def test_spent_cpu_time_is_told_from_a_kill() -> None:
    for _ in range(3):
        assert run_program("while True: pass", Limits(seconds=1)).reason == "timed out"
    assert run_program("import os; os.kill(os.getpid(), 9)", SMALL).reason == "ended early, with status -9"


@pytest.mark.parametrize("waiting", ["while True: pass", "import time\nwhile True: time.sleep(600)"])
def test_a_program_without_end_is_stopped(waiting: str) -> None:
    assert run_program(waiting, Limits(seconds=1)) == Outcome(False, "timed out")


def test_a_program_that_asks_gets_no_answer() -> None:
    assert run_program("input()", SMALL) == Outcome(False, "EOFError: EOF when reading a line")


@posix_only
def test_memory_is_limited() -> None:
    assert run_program("x = bytearray(2**28)", SMALL).passed
    outcome = run_program("x = bytearray(2**31)", SMALL)
    assert not outcome.passed
    assert outcome.reason == "MemoryError"


@posix_only
@pytest.mark.parametrize(("size", "reason"), [(2**28, "passed"), (2**31, "subprocess.CalledProcessError")])
def test_memory_of_what_a_program_starts_is_limited(size: int, reason: str) -> None:
    outcome = run_program(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'bytearray({size})'], check=True)", SMALL
    )
    assert outcome.reason.startswith(reason)


@posix_only
def test_files_are_limited_and_gone_afterwards(tmp_path: Path) -> None:
    told = tmp_path / "where"
    assert run_program(
        f"import os; open({str(told)!r}, 'w').write(os.getcwd()); open('x', 'w').write('y')", SMALL
    ).passed
    assert not Path(told.read_text()).exists()
    assert not run_program("open('x', 'wb').write(bytes(2**20))", SMALL).passed


@posix_only
def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    told = tmp_path / "child"
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(told)!r}, "w").write(str(child.pid))
"""
    assert run_program(program).passed
    pid = int(told.read_text())
    wait_until(lambda: not is_running(pid))  # whoever adopted it may take note of its end a little later


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "zombie" in status.read_text())


def test_the_program_sees_no_environment_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARA_TEST_SECRET", "1")
    assert run_program("import os; assert 'NARA_TEST_SECRET' not in os.environ").passed
    assert not run_program("import torch_of_nobody").passed


# What docs/evaluation.md says that a program can do, so that nobody takes the limits for a sandbox.


def test_run_program_lets_a_program_write_outside_of_its_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert run_program(f"open({str(elsewhere)!r}, 'w').write('here')").passed
    assert elsewhere.read_text() == "here"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_run_program_lets_a_program_read_the_environment_that_we_were_started_with(tmp_path: Path) -> None:
    reading = """
import os
for name in filter(str.isdigit, os.listdir("/proc")):
    try:
        found = b"NARA_TEST_SECRET=1" in open(f"/proc/{name}/environ", "rb").read()
    except OSError:
        continue
    if found:
        break
else:
    raise LookupError
"""
    asking = f"import runpy; print(runpy.run_path({execution.__file__!r})['run_program']({reading!r}).passed)"
    environment = {**os.environ, "NARA_TEST_SECRET": "1"}
    evaluation = subprocess.run([sys.executable, "-c", asking], env=environment, capture_output=True, check=True)
    assert evaluation.stdout.split() == [b"True"]


def test_run_program_lets_a_program_forge_a_pass() -> None:
    forging = """
import os
exec(open(__file__).read().splitlines()[-1])
os._exit(0)
"""
    assert run_program(f"{forging}\nassert False").passed
