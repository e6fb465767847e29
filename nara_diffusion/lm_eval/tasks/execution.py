"""Running a Python program that a model wrote, in a process of its own with limits.

The process is another interpreter (-I: without the user's packages and PYTHON… variables), with only PATH of our
environment, in an empty folder that is removed afterwards. On POSIX systems `Limits` holds for it and for each process
that it starts; the number of processes and of files is not limited. When the program ends, or its time is over, its
process group is killed (on Windows the program alone).

This contains accidents: endless loops, floods of memory or output, files and processes left behind. It is no sandbox
against malice. The program runs as the user, so it can read and write all files of the user and reach the network; read
our environment, with its tokens, where the system shows it (Linux: /proc); forge a pass by exiting as if its tests had
passed; leave processes in a session of their own. Run it in a container without secrets, and read the programs before
you trust a surprising score.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# What the new interpreter does first. At the same soft and hard limit of CPU time the kernel kills without saying why.
_START = """
import runpy, sys
try:
    import resource
except ImportError:
    resource = None
seconds, memory, size = map(int, sys.argv[1:4])
wanted = {"RLIMIT_CPU": (seconds, seconds + 1), "RLIMIT_AS": (memory,) * 2, "RLIMIT_FSIZE": (size,) * 2}
for name, pair in {**wanted, "RLIMIT_CORE": (0, 0)}.items() if resource else ():
    hard = resource.getrlimit(getattr(resource, name))[1]
    hard = float("inf") if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(getattr(resource, name), tuple(min(value, hard) for value in pair))
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Limits:
    """Attributes:
    seconds: the CPU time of each process; the program is stopped after twice as many seconds of wall time.
    memory: the address space of each process, in bytes.
    file_size: the size of each file that is written, in bytes; stderr is one.
    """

    seconds: int = 10
    memory: int = 4 * 2**30
    file_size: int = 16 * 2**20


def run_program(program: str, limits: Limits = Limits()) -> str:
    """Run `program` until it ends or exceeds its limits. Its output is not kept.

    Returns:
        "passed", if it reached its end or made it look so; else "timed out", or the last line that it wrote to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="nara-eval-", ignore_cleanup_errors=True) as folder:
        file, errors, end = Path(folder) / "program.py", Path(folder) / "stderr", Path(folder) / secrets.token_hex(8)
        # a program that leaves early, by sys.exit(0) say, hasn't run its tests
        file.write_text(f"{program}\n\nopen({str(end)!r}, 'w').close()\n", encoding="utf-8", errors="replace")
        status = _wait(file, errors, limits)
        if status == 0 and end.exists():
            return "passed"
        if status is None or -status == getattr(signal, "SIGXCPU", None):
            return "timed out"
        lines = errors.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else f"ended early, with status {status}"


def _wait(file: Path, errors: Path, limits: Limits) -> int | None:
    """Run `file`, and return its exit status, or None if it was stopped."""
    numbers = map(str, (limits.seconds, limits.memory, limits.file_size))
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", _START, *numbers, str(file)],
            cwd=file.parent,
            env={"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            return process.wait(2 * limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait()
