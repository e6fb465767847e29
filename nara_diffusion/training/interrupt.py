"""Ctrl-C (SIGINT) and SIGTERM, which Slurm and Kubernetes send before they kill.

During training both are requests: the step in progress ends, then the loop saves and stops. A second Ctrl-C stops at
once; SIGTERM asks as often as it comes. Before and after training both stop at once, as a KeyboardInterrupt.

`accelerate launch` passes signals on if it starts several processes, and kills them after 30 seconds. Ctrl-C then
comes twice, from the terminal and from the launcher. Of one process it only dies before it: `follow_launcher` makes
that a SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_ECHO = 2.0  # seconds in which a second SIGINT is the launcher's
_PR_SET_PDEATHSIG = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM came where nothing can be saved."""


class InterruptRequest:
    """`with InterruptRequest() as request: …`; `request.signal` is the signal that came, or 0. Restores the earlier
    handlers.

    Outside the main thread, where Python allows no handlers, it stays 0.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal = 0
        self._clock = clock
        self._came = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal and self._clock() > self._came + _ECHO:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._came = number, self._clock()


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises `Terminated`, as SIGINT raises KeyboardInterrupt, so that both clean up alike."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code that a shell reports for a process that a signal ended."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def leave_signals_to_main_process(worker: int) -> None:
    """Make a data loader's worker ignore the signals: the main process still needs its batches.

    SIGTERM counts the second time, which is when the main process wants to be rid of a worker that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def follow_launcher() -> None:
    """Under `accelerate launch` on Linux, get SIGTERM when the launcher ends: it doesn't pass its own on."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
