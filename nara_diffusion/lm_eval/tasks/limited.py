"""A script that runs a program within limits, and ends every process that it started. Standard library only.

python -I limited.py '{"RLIMIT_CPU": 10, …}' PROGRAM.py

The program runs in a child process, the leader of a session. When it has ended, or on SIGTERM, its process group is
killed, and then this process's children until there are none. On Linux this process is a subreaper, so every orphaned
descendant becomes its child, in any session; and it gets SIGTERM when its own parent ends. On other POSIX systems only
the group is killed. On Windows the program runs in this process, and nothing is killed.

It ends as the program did: with its exit status, or by the same signal.
"""

import json
import os
import runpy
import signal
import sys
import time
from contextlib import suppress

# constants of linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PATIENCE = 5  # seconds, for processes that can't be killed


def lower(limits: dict[str, int]) -> None:
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


def supervise() -> None:
    """Fork: the child returns, to run the program; the parent waits for it, ends what is left, and exits."""
    lower({"RLIMIT_CORE": 0})  # a signal that ends the program ends this process too
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
    end_children(program)
    _exit_like(os.waitstatus_to_exitcode(status) if ended else -signal.SIGTERM)


def _control(option: int, value: int) -> None:
    """Call Linux's prctl; without it or ctypes, only the process group is ended."""
    if sys.platform == "linux":
        with suppress(ImportError):
            import ctypes

            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_children(group: int) -> None:
    """Kill the group, and children until there are none; a child's own children become ours when it ends."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    with suppress(ChildProcessError):  # none is left
        while time.monotonic() < end:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            for pid in children():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)


def children() -> list[int]:
    """The children of this process, by /proc; none where there is no /proc."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with suppress(OSError, IndexError, ValueError), open(f"/proc/{int(name)}/stat", "rb") as file:
            # PID (NAME) STATE PARENT …; the name may hold anything
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def _exit_like(code: int) -> None:
    """End this process with an exit status, or by a signal where `code` is below zero."""
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


if __name__ == "__main__":
    if hasattr(os, "fork"):
        supervise()
    lower(json.loads(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
