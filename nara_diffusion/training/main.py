"""The entry point of both train scripts: logging, command line, and errors in one line.

An error that this package raises is shown as one line that says what to do, and so is a stop by Ctrl-C or SIGTERM.
Any other error keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from nara_diffusion.training.arguments.cli import parse_arguments

from .interrupt import Terminated, exit_code, follow_launcher, sigterm_interrupts
from .loop import TrainingDiverged
from .oom import OutOfMemory

logger = logging.getLogger(__name__)

REFUSALS = (ValueError, OSError, OutOfMemory, TrainingDiverged)
_OWN_CODE = (Path(__file__).parents[1], Path(__file__).parents[2] / "train_scripts")


def run_command(
    main: Callable[[Any], Any],
    arguments: type,
    about: str | None,
    shipped: Mapping[str, Any],
    stand_in: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Log progress from the first process and warnings from all, read the command line, and call `main` with it.

    Args:
        arguments: the dataclass of arguments.
        about: what `--help` shows first.
        shipped: values of the run without arguments, for `--help`.
        stand_in: see `parse_arguments`.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # else a line for each file of a checkpoint
    values = " ".join(f"{name}={value}" for name, value in shipped.items())
    description = f"{about}\nThe shipped run has these values in place of the defaults below:\n{fill(values, 110)}"
    follow_launcher()
    try:
        with sigterm_interrupts():
            main(parse_arguments(arguments, description=description, stand_in=stand_in))
    except REFUSALS as error:
        if not raised_here(error):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        name = "SIGTERM" if isinstance(stop, Terminated) else "Ctrl-C"
        logger.info("%s", f"stopped by {name}. {stop}".rstrip())  # of all processes, by the first
        sys.exit(exit_code(stop))


def raised_here(error: BaseException) -> bool:
    """Whether it was a line of this project that raised `error`, rather than one of a library that it called."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(folder.resolve() in last.parents for folder in _OWN_CODE)
