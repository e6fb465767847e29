"""The entry point of both train scripts: logging, command line, and errors in one line.

An error that this package raises is shown as one line that says what to do, and so is a stop by Ctrl-C or SIGTERM,
which Slurm and Kubernetes send before they kill. (In the loop they end the step in progress and save.) Any other error
keeps its traceback.
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
from typing import Any

from .loop import TrainingDiverged
from .parser import merged, parse_arguments

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

ASSETS = Path(__file__).resolve().parents[2] / "examples" / "assets"
"""The shipped models and data, which a clone of the repository has and a wheel hasn't."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came where nothing can be saved."""


def run_command(
    main: Callable[[Any], Any],
    arguments: type,
    about: str | None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Log progress from the first process and warnings from all, read the command line, and call `main` with it.

    Args:
        arguments: the dataclass of arguments.
        about: what `--help` shows first.
        defaults: see `parse_arguments`.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # else a line for each file of a checkpoint
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # `accelerate launch` of one process dies of SIGTERM without passing it on: get one when it ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        main(parse_arguments(arguments, description=about, defaults=defaults))
    except (ValueError, OSError, TrainingDiverged) as error:
        origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if Path(__file__).resolve().parents[1] not in origin.parents:
            raise  # of a library
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        logger.info("stopped by %s.", "SIGTERM" if number == signal.SIGTERM else "Ctrl-C")
        sys.exit(128 + number)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(*_: object) -> None:
    raise Terminated


def own_settings(values: Mapping[str, Any], given: Mapping[str, Any], names: str) -> str:
    """What is said of a shipped run's own settings: those of `names` that weren't `given`."""
    own = merged(values, given)
    return ", ".join(f"{name} {own[name]}" for name in names.split() if name in own and name not in given)


def shipped(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, the arguments of the shipped run.

    Raises:
        ValueError: its model isn't here, outside of a clone.
    """
    if not Path(values["pretrained_model_name_or_path"]).exists():
        raise ValueError("give --pretrained_model_name_or_path: shipped models are in a clone of the repository only.")
    here = {name: value for name, value in values.items() if str(value).startswith(str(ASSETS))}
    return {**values, **{name: os.path.relpath(value) for name, value in here.items()}}
