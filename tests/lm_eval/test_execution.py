"""Programs run apart from us, not for longer or larger than they may, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nara_diffusion.lm_eval.tasks import execution
from nara_diffusion.lm_eval.tasks.execution import Limits, Outcome, run_program

SMALL = Limits(seconds=60, memory=2**30, file_size=2**16)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert sum([1, 2]) == 3", "passed"),
        ("def f():\n    return 1\n\nassert f() == 2, 'f gives 1'", "AssertionError: f gives 1"),
        ("import sys; sys.exit(0)\nassert False", "ended early, with status 0"),
        ("import os; os._exit(0)", "ended early, with status 0"),
        ("import os; os.kill(os.getpid(), 9)", "ended early, with status -9"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import os; assert 'NARA_TEST_SECRET' not in os.environ", "passed"),
        pytest.param("x = bytearray(2**28)", "passed", marks=posix_only),
        pytest.param("x = bytearray(2**31)", "MemoryError", marks=posix_only),
        pytest.param("open('x', 'wb').write(bytes(2**20))", "OSError: [Errno 27] File too large", marks=posix_only),
    ],
)
def test_program_ends_as_it_may(program: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARA_TEST_SECRET", "1")
    assert run_program(program, SMALL) == Outcome(reason == "passed", reason)


@pytest.mark.parametrize("waiting", ["while True: pass", "import time\nwhile True: time.sleep(600)"])
def test_program_without_end_is_stopped(waiting: str) -> None:
    assert run_program(waiting, Limits(seconds=1)) == Outcome(False, "timed out")


# what a descendant does, with a file as its argument that says that it is there
SLEEPING = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(600)"
DAEMON = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", {SLEEPING!r}, sys.argv[1]])
    os._exit(0)
os.wait()
"""
ENDS = {"passed": "", "timed out": "time.sleep(600)", "ended early, with status -9": "os.kill(os.getpid(), 9)"}


def program(mark: Path, start: str, end: str) -> str:
    """A program that ends when its descendant is there, which has `mark` on its command line."""
    return f"""
import os, subprocess, sys, time
command = [sys.executable, "-c", {start!r}, {str(mark)!r}]
child = subprocess.Popen(command, start_new_session=True)
while not os.path.exists({str(mark)!r}):
    time.sleep(0.01)
{end}
"""


def running(mark: Path) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(mark) in words:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper and /proc")
@pytest.mark.parametrize("start", [SLEEPING, DAEMON], ids=["in another session", "daemon"])
@pytest.mark.parametrize("reason", ENDS)
def test_nothing_of_a_program_is_left(tmp_path: Path, start: str, reason: str) -> None:
    mark = tmp_path / "mark"
    limits = Limits(seconds=2 if reason == "timed out" else 60)
    assert run_program(program(mark, start, ENDS[reason]), limits).reason == reason
    assert mark.exists()
    assert running(mark) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper and /proc")
def test_nothing_is_left_where_the_evaluation_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    text = program(mark, SLEEPING, "time.sleep(600)")
    asking = f"import runpy; runpy.run_path({execution.__file__!r})['run_program']({text!r})"  # without importing torch
    with subprocess.Popen([sys.executable, "-c", asking], stderr=subprocess.DEVNULL) as evaluation:
        while not (mark.exists() and running(mark)):
            time.sleep(0.01)
        evaluation.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while running(mark) and time.monotonic() < end:
        time.sleep(0.01)
    assert running(mark) == []
