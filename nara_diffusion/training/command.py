"""Run a train script's main: errors and signals in one line each.

An error that this package raises is shown as one line that says what to do. Any other error keeps
its traceback. Ctrl-C and SIGTERM, which Slurm and Kubernetes send before they kill a process, are
also reported in one line. During training, either one finishes the current step and saves.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import nara_flags
from nara_flags.parser import Defaults, merged

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_OWN = (Path(__file__).resolve().parents[1], Path(nara_flags.__file__).resolve().parent)
"""The folders whose errors are explained; errors from elsewhere are those of a library."""

Arguments = TypeVar("Arguments")


class TrainingDiverged(ArithmeticError):
    """The loss or its gradient is not finite."""


def run_command(
    main: Callable[[Arguments], Any],
    arguments: Callable[..., Arguments],
    given: Mapping[str, Any],
    defaults: Defaults,
) -> None:
    """Log progress (first process) and warnings (all), and call `main` with the arguments.

    Args:
        arguments: the dataclass of arguments.
        given: what `nara_flags.parser.read_flags` returned.
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
        main(arguments(**merged(defaults(given), given)))
    except (ValueError, OSError, TrainingDiverged) as error:
        origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not any(folder in origin.parents for folder in _OWN):
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
