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
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ECHO = 2.0  # seconds in which a second SIGINT is the launcher's
_PR_SET_PDEATHSIG = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM came where nothing can be saved."""


class InterruptRequest:
    """`with InterruptRequest() as request: …`; `request.signal` is the signal that came, or 0. Restores the earlier
    handlers. Outside the main thread, where Python allows no handlers, it stays 0."""

    def __init__(self) -> None:
        self.signal = 0
        self._came = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal and time.monotonic() > self._came + _ECHO:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._came = number, time.monotonic()


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises `Terminated`, as SIGINT raises KeyboardInterrupt, so that both clean up alike."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def follow_launcher() -> None:
    """Under `accelerate launch` on Linux, get SIGTERM when the launcher ends: it doesn't pass its own on."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
