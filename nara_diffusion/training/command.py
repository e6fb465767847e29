"""What both train scripts do when they are started from a shell."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from textwrap import fill
from typing import Any

from nara_diffusion.training.cli import parse_arguments


def run_command(
    main: Callable[[Any], Any],
    arguments: type,
    about: str | None,
    shipped: Mapping[str, Any],
    stand_in: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Logs progress from the first process and warnings from all, reads the command line, and calls `main` with it.

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
    main(parse_arguments(arguments, description=description, stand_in=stand_in))
