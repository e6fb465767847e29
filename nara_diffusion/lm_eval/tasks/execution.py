"""Running a Python program that a model wrote, in a process of its own with limits.

The process is another interpreter (-I: without the user's packages and PYTHON… variables), with only PATH of our
environment, in an empty folder that is removed afterwards. On POSIX systems `Limits` holds for it and for each process
that it starts; the number of processes and of files is not limited. When the program ends, or its time is over, what it
started is killed: on Linux all its descendants, on other POSIX systems its process group, on Windows only the program.

This contains accidents: endless loops, floods of memory or output, files and processes left behind. It is no sandbox
against malice. The program runs as the user, so it can read and write all files of the user and reach the network; read
our environment, with its tokens, where the system shows it (Linux: /proc); forge a pass by exiting as if its tests had
passed; kill its supervisor. Run it in a container without secrets, and read the programs before you trust a surprising
score.

This file is also the supervisor: `python -I execution.py '{"RLIMIT_CPU": 10, …}' PROGRAM.py` runs the program in a
child, the leader of a session, and ends as it did. It imports the standard library only.
"""

from __future__ import annotations

import json
import os
import runpy
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# constants of linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PATIENCE = 30  # seconds for the supervisor to end what the program started; a fifth of it for what can't be killed


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
        lines = errors.read_text("utf-8", "replace").strip().splitlines()
        return Outcome(False, lines[-1][:200] if lines else f"ended early, with status {status}")


def _wait(file: Path, errors: Path, limits: Limits) -> int | None:
    """Run `file`, and return its exit status, or None if it was stopped."""
    posix = {"RLIMIT_CPU": limits.seconds, "RLIMIT_AS": limits.memory, "RLIMIT_FSIZE": limits.file_size}
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", __file__, json.dumps({**posix, "RLIMIT_CORE": 0}), str(file)],
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
            process.terminate()  # the supervisor ends the program's processes first
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            process.wait()


# The supervisor


def supervise() -> None:
    """Fork: the child returns, to run the program; the parent waits for it, ends what is left, and exits as it did.

    On Linux the parent is a subreaper, so every orphaned descendant becomes its child, in any session; and it gets
    SIGTERM when its own parent ends.
    """
    _lower({"RLIMIT_CORE": 0})  # a signal that ends the program ends this process too
    _control(PR_SET_CHILD_SUBREAPER, 1)
    awaited = {signal.SIGCHLD, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    _control(PR_SET_PDEATHSIG, signal.SIGTERM)
    program = os.fork()
    if program == 0:
        os.setsid()
        _control(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    ended, status = 0, 0
    while not ended and signal.sigwait(awaited) == signal.SIGCHLD:
        ended, status = os.waitpid(program, os.WNOHANG)
    _end_children(program)
    code = os.waitstatus_to_exitcode(status) if ended else -signal.SIGTERM
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def _lower(limits: dict[str, int]) -> None:
    """Set each POSIX limit to its value, or to the system's own limit if that is lower. Windows has none."""
    try:
        import resource
    except ImportError:
        return
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            # a second after the signal for spent CPU time: at the same limit the kernel kills without saying why
            wanted = (value, value + 1 if name == "RLIMIT_CPU" else value)
            unlimited = hard == resource.RLIM_INFINITY
            resource.setrlimit(kind, wanted if unlimited else (min(wanted[0], hard), min(wanted[1], hard)))


def _control(option: int, value: int) -> None:
    """Call Linux's prctl; without it or ctypes, only the process group is ended."""
    if sys.platform == "linux":
        with suppress(ImportError):
            import ctypes

            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_children(group: int) -> None:
    """Kill the group, and children until there are none; a child's own children become ours when it ends."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    end = time.monotonic() + PATIENCE / 5
    with suppress(ChildProcessError):  # none is left
        while time.monotonic() < end:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            for pid in _children():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)


def _children() -> list[int]:
    """The children of this process, by /proc; none where there is no /proc."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with suppress(OSError, IndexError, ValueError), open(f"/proc/{int(name)}/stat", "rb") as file:
            # PID (NAME) STATE PARENT …; the name may hold anything
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


if __name__ == "__main__":
    if hasattr(os, "fork"):
        supervise()
    _lower(json.loads(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
