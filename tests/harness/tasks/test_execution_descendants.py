"""All processes that came of a program end with it, whatever session they moved to and however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nara_diffusion.harness.tasks import execution
from nara_diffusion.harness.tasks.execution import Limits, run_program
from tests.helpers.patience import LAST_RESORT, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper and /proc")

# What a descendant does, with a file as its argument that says that it is there.
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
ENDING = {"at its end": "", "out of time": "time.sleep(600)", "by a signal": "os.kill(os.getpid(), 9)"}
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


def left(mark: Path) -> list[int]:
    """Those that still run, which are ended."""
    found = running(mark)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


def out_of_time_when(mark: Path) -> type[subprocess.Popen]:
    """A process that is waited for until `mark` is there, and then has had its time."""

    class Timed(subprocess.Popen):
        timed_out = False

        def wait(self, timeout: float | None = None) -> int:
            if self.timed_out:
                return super().wait(timeout)
            wait_until(mark.exists)
            self.timed_out = True
            raise subprocess.TimeoutExpired(self.args, 0)

    return Timed


@pytest.mark.parametrize("start", STARTING)
@pytest.mark.parametrize("end", ENDING)
def test_nothing_of_a_program_is_left(tmp_path: Path, start: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    if end == "out of time":
        monkeypatch.setattr(execution.subprocess, "Popen", out_of_time_when(mark))
    outcome = run_program(program(mark, start, end), Limits(seconds=LAST_RESORT))
    assert mark.exists()
    assert left(mark) == []
    assert outcome.reason == REASONS[end]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_where_the_evaluation_is_stopped(tmp_path: Path, end: signal.Signals) -> None:
    mark = tmp_path / "mark"
    text = program(mark, "in a session of its own", "out of time")
    # without importing torch; a child of a job in the background would ignore SIGINT
    asking = f"""
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
names = runpy.run_path({execution.__file__!r})
names["run_program"]({text!r}, names["Limits"](seconds={LAST_RESORT}))
"""
    with subprocess.Popen([sys.executable, "-c", asking], stderr=subprocess.DEVNULL) as evaluation:
        wait_until(mark.exists)
        assert running(mark)
        evaluation.send_signal(end)
    wait_until(lambda: not running(mark))
