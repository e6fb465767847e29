"""Running a Python program that a model wrote, in a process of its own with limits.

The process is another interpreter (-I: without the user's packages and PYTHON… variables), with only PATH of our
environment, in an empty folder that is removed afterwards. On POSIX systems (`limited`) `Limits` holds for it and for
each process that it starts; the number of processes and of files is not limited. When the program ends, or its time is
over, what it started is killed: on Linux all its descendants, on other POSIX systems its process group, on Windows
only the program itself.

This contains accidents: endless loops, floods of memory or output, files and processes left behind. It is no sandbox
against malice. The program runs as the user, so it can

- read and write all files of the user, and reach the network;
- read our environment, with its tokens, where the system shows it to the user's other processes (Linux: /proc);
- forge a pass: read the line after its tests that reports that they passed, do the same, and exit;
- kill its supervisor, or have a service of the machine run something.

Run it in a container without secrets, and read the programs before you trust a surprising score.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = Path(__file__).with_name("limited.py")
PATIENCE = 30  # seconds for the launcher to end what the program started


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

    def posix(self) -> str:
        """The POSIX limits that `limited` sets: {name: value}."""
        limits = {"RLIMIT_AS": self.memory, "RLIMIT_FSIZE": self.file_size, "RLIMIT_CORE": 0}
        return json.dumps({"RLIMIT_CPU": self.seconds, **limits})


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    passed: whether the program reached its end, or made it look so.
    reason: "passed", "timed out", or the last line that the program wrote to stderr.
    """

    passed: bool
    reason: str


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Run `program` until it ends or exceeds its limits. Its output is not kept."""
    with tempfile.TemporaryDirectory(prefix="nara-eval-", ignore_cleanup_errors=True) as folder:
        file, errors, end = Path(folder) / "program.py", Path(folder) / "stderr", Path(folder) / secrets.token_hex(8)
        # a program that leaves early, by sys.exit(0) say, hasn't run its tests
        file.write_text(f"{program}\n\nopen({str(end)!r}, 'w').close()\n", encoding="utf-8", errors="replace")
        status = _wait(file, errors, limits)
        if status == 0 and end.exists():
            return Outcome(True, "passed")
        if status is None or -status == getattr(signal, "SIGXCPU", None):
            return Outcome(False, "timed out")
        return Outcome(False, _last_line(errors) or f"ended early, with status {status}")


def _wait(file: Path, errors: Path, limits: Limits) -> int | None:
    """Run `file`, and return its exit status, or None if it was stopped."""
    command = [sys.executable, "-I", "-X", "utf8", str(LAUNCHER), limits.posix(), str(file)]
    environment = {"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"}
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=file.parent,
            env=environment,
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
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End the launcher, which first ends the program's processes; on Windows the launcher is the program."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
