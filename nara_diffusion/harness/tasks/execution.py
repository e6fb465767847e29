"""Running a Python program that a model wrote, in a process of its own with limits.

The process is another interpreter (-I: the user's packages and PYTHON… variables don't count), with PATH alone of our
environment, in an empty folder that is removed afterwards. Where the system has POSIX limits (`limited`), it can't use
more than `Limits` allows, and neither can any process that it starts; but each of them may use as much, and how many
there are isn't limited, nor is the number of files. When the program ends, or has had its time, what it started is
killed: on Linux every process that came of it, in other POSIX systems those of its group, on Windows none but itself.

This keeps accidents small: a loop without end, a flood of memory or output, files and processes left behind. It is no
sandbox against malice. The program runs as the user, so it can

- read and write what the user can, wherever that is, and reach the network;
- read our environment, with its tokens, where the system shows it to the user's other processes (Linux: /proc);
- forge a pass: it can read the line, after its tests, that says that they passed, do what that says, and leave;
- kill what supervises it, or have a service of the machine run something.

Run it in a container that holds nothing worth reading, and read the programs before you trust a surprising score.
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
    seconds: the CPU time of each process; the program is stopped after twice as long.
    memory: the bytes of address space of each process.
    file_size: the bytes of each file that is written, the error messages included.
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
    passed: whether the program came to its last line, or made it look so.
    reason: "passed", "timed out", or why not: the last line that it wrote to stderr.
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
    """The exit status of `file` as a program, or None if it had to be stopped."""
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
    """End the launcher, which first ends the program's processes; on Windows the process is the program."""
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
