"""Programs run apart from us, not for longer or larger than they may, and nothing of them is left."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from nara_diffusion.lm_eval.tasks.functions import run_program

SMALL = {"seconds": 60, "memory": 2**30, "file_size": 2**16}
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
    assert run_program(program, **SMALL) == reason


def test_program_without_end_is_stopped() -> None:
    assert run_program("while True: pass", seconds=1) == "timed out"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("ending", ["", "import time; time.sleep(600)"])
def test_what_a_program_started_ends_with_it(tmp_path: Path, ending: str) -> None:
    told = tmp_path / "child"
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(told)!r}, "w").write(str(child.pid))
{ending}
"""
    assert run_program(program, seconds=1) == ("timed out" if ending else "passed")
    status = Path(f"/proc/{told.read_text()}/status")
    end = time.monotonic() + 30  # whoever adopted it may take note of its end a little later
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.01)
    assert not status.exists() or "zombie" in status.read_text()
