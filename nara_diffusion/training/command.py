"""Run a train script's main: errors and signals in one line each.

An error that this package raises is shown as one line that says what to do. Any other error keeps
its traceback. Ctrl-C and SIGTERM, which Slurm and Kubernetes send before they kill a process, are
also reported in one line. During training, either one finishes the current step and saves, in all
processes at once (`InterruptRequest`).
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import nara_flags
from nara_flags.parser import Defaults, merged

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_SOURCES = (Path(__file__).resolve().parents[1], Path(nara_flags.__file__).resolve().parent)
"""The folders of the code whose errors are shown in one line."""
_ECHO = 2.0  # seconds; a second SIGINT within this time is the launcher's copy of the first

Arguments = TypeVar("Arguments")


class TrainingDiverged(ArithmeticError):
    """The loss or its gradient is not finite."""


def run_command(
    main: Callable[[Arguments], Any],
    arguments: Callable[..., Arguments],
    flags: Mapping[str, Any],
    defaults: Defaults,
) -> None:
    """Log progress (first process) and warnings (all), and call `main` with the arguments.

    Args:
        arguments: the dataclass of arguments.
        flags: what `nara_flags.parser.read_flags` returned.
        defaults: see `Defaults`.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    # accelerate logs one line for each file of a checkpoint
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # `accelerate launch` of one process doesn't forward SIGTERM: request it when that dies
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        main(arguments(**merged(defaults(flags), flags)))
    except (ValueError, OSError, TrainingDiverged) as error:
        origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not any(folder in origin.parents for folder in _SOURCES):
            raise  # an error of a library
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if stop.args == (signal.SIGTERM,) else signal.SIGINT
        logger.info("stopped by %s.", "SIGTERM" if number == signal.SIGTERM else "Ctrl-C")
        sys.exit(128 + number)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


class InterruptRequest:
    """Record Ctrl-C and SIGTERM inside the context: `with InterruptRequest() as request: …`.

    `request.signal` is the signal received, SIGINT (Ctrl-C) or SIGTERM, or else 0. A second Ctrl-C
    stops the program at once. Python allows signal handlers only in the main thread; in another
    thread `signal` is always 0.

    Args:
        processes: the number of processes of the run. All of them enter the context together.
    """

    def __init__(self, processes: int = 1) -> None:
        self.signal, self._came = 0, 0.0
        # gloo uses tensors on the CPU, so `of_any_process` doesn't wait for a device
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
        """Return the signal that any process received, or 0. All processes get the same answer."""
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
