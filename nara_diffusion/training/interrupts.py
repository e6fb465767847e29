"""Ctrl-C and SIGTERM, which end training after the present step, in all processes at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

_ECHO = 2.0  # s; a second SIGINT within this time is the launcher's copy of the first


class InterruptRequest:
    """Record Ctrl-C and SIGTERM: `with InterruptRequest() as request: …`.

    `request.signal` is the signal that came, SIGINT (Ctrl-C) or SIGTERM, or 0. A second Ctrl-C
    stops at once. Outside the main thread, where Python allows no handlers, it stays 0.

    Args:
        processes: how many train together. All of them make a request, at the same time.
    """

    def __init__(self, processes: int = 1) -> None:
        self.signal, self._came = 0, 0.0
        # gloo's tensors are on the CPU, so that `of_any_process` waits for no device
        self._group = dist.new_group(backend="gloo") if processes > 1 else None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def of_any_process(self) -> int:
        """Return the signal that any process got, or 0, so that all stop at the same step."""
        if self._group is None:
            return self.signal
        numbers = torch.tensor([self.signal])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal and time.monotonic() > self._came + _ECHO:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._came = number, time.monotonic()
