"""All processes that came of a program end with it, whatever session they moved to and however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nara_diffusion.harness import execution
from nara_diffusion.harness.execution import Limits, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper and /proc")

# What a descendant does, with a file as its argument that says that it is there.
SLEEPING = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"
DAEMON = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", {SLEEPING!r}, sys.argv[1]])
    os._exit(0)
os.wait()
"""
MOVING_ON = """
import os, sys, time
end = time.monotonic() + 20
while time.monotonic() < end:  # another process each time
    if os.fork():
        os._exit(0)
    os.setsid()
    open(sys.argv[1], "w").close()
"""
STARTING = {"in its group": SLEEPING, "in a session of its own": SLEEPING, "daemon": DAEMON, "moving on": MOVING_ON}
ENDING = {"at its end": "", "out of time": "time.sleep(60)", "by a signal": "os.kill(os.getpid(), 9)"}
REASONS = {"at its end": "passed", "out of time": "timed out", "by a signal": "ended early, with status -9"}


def program(mark: Path, start: str, end: str) -> str:
    """A program that ends when its descendant is there, which has `mark` on its command line."""
    return f"""
import os, subprocess, sys, time
command = [sys.executable, "-c", {STARTING[start]!r}, {str(mark)!r}]
child = subprocess.Popen(command, start_new_session={start != "in its group"})
while not os.path.exists({str(mark)!r}):
    time.sleep(0.01)
{ENDING[end]}
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


def left(mark: Path, seconds: float) -> list[int]:
    """Those that still run after so long."""
    end = time.monotonic() + seconds
    while (found := running(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


@pytest.mark.parametrize("start", STARTING)
@pytest.mark.parametrize("end", ENDING)
def test_nothing_of_a_program_is_left(tmp_path: Path, start: str, end: str) -> None:
    mark = tmp_path / "mark"
    outcome = run_program(program(mark, start, end), Limits(seconds=2 if end == "out of time" else 10))
    assert mark.exists()
    assert left(mark, 0) == []
    assert outcome.reason == REASONS[end]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_where_the_evaluation_is_stopped(tmp_path: Path, end: signal.Signals) -> None:
    mark = tmp_path / "mark"
    text = program(mark, "in a session of its own", "out of time")
    asking = f"import runpy; runpy.run_path({execution.__file__!r})['run_program']({text!r})"  # without importing torch
    with subprocess.Popen([sys.executable, "-c", asking], stderr=subprocess.DEVNULL) as evaluation:
        until = time.monotonic() + 60
        while not mark.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert running(mark)
        evaluation.send_signal(end)
    assert left(mark, 10) == []
