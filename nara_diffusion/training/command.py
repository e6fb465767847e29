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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .loop import TrainingDiverged
from .parser import merged, parse_arguments

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

CONFIGS = Path(__file__).resolve().parents[2] / "train_scripts" / "configs"
"""The settings of shipped runs, which a clone of the repository has and a wheel hasn't, as their models and data."""


def run_command(
    main: Callable[[Any], Any],
    arguments: type,
    about: str | None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Log progress from the first process and warnings from all, read the command line, and call `main` with it.

    With --check, the command `nara check` gets the arguments in place of `main`.

    Args:
        arguments: the dataclass of arguments.
        about: what `--help` shows first.
        defaults: see `parse_arguments`.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    logging.getLogger("accelerate").setLevel(
        logging.WARNING
    )  # else a line for each file of a checkpoint
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # `accelerate launch` of one process dies of SIGTERM without passing it on: get one when it ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        args = parse_arguments(arguments, description=about, defaults=defaults)
        if args.check:
            from nara_command import check_run  # the command imports check, which imports the mains

            check_run(args)
        else:
            main(args)
    except (ValueError, OSError, TrainingDiverged) as error:
        origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if Path(__file__).resolve().parents[1] not in origin.parents:
            raise  # of a library
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if stop.args == (signal.SIGTERM,) else signal.SIGINT
        logger.info("stopped by %s.", "SIGTERM" if number == signal.SIGTERM else "Ctrl-C")
        sys.exit(128 + number)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def shipped_settings(
    config: Path, given: Mapping[str, Any], own: Sequence[str], *, toy: str, told: str, advice: str
) -> dict[str, Any]:
    """The arguments of a shipped run, which the file `config` holds; without its data, where a user's own are `given`.

    Args:
        own: the names of its data. A user's are given if the first is, which the log then says: that they teach `toy`,
            by the run's own settings, of which it names `told`, and the `advice`.

    Raises:
        ValueError: there is no such file, or its model isn't here, outside of a clone.
    """
    values = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    places = {name: value for name, value in values.items() if str(value).startswith("examples/")}
    values |= {name: os.path.relpath(CONFIGS.parents[1] / value) for name, value in places.items()}
    if not Path(values.get("pretrained_model_name_or_path", config)).exists():
        raise ValueError(
            "give --pretrained_model_name_or_path: shipped models are in a clone of the repository only."
        )
    if own[0] in given:
        both = merged(values, given)
        settings = ", ".join(
            f"{name} {both[name]}" for name in told.split() if name in both and name not in given
        )
        taught = (
            f"{values['pretrained_model_name_or_path']}, {toy}, with its own settings ({settings})"
        )
        logger.info("no model was named: your data teach %s; for %s", taught, advice)
        values = {name: value for name, value in values.items() if name not in own}
    return values
