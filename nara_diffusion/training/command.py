"""The command line of both train scripts: flags and a YAML file, logging, one-line errors.

Flags win over the file given as `--config`, the file wins over the defaults, and both are checked
alike. `--help` shows the common options, `--help_all` all of them. Hyphens in a flag count as
underscores.

An error that this package raises is shown as one line that says what to do. So is a stop by Ctrl-C
or by SIGTERM, which Slurm and Kubernetes send before they kill. (In the loop, either one ends the
step in progress and saves.) Any other error keeps its traceback.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import difflib
import inspect
import logging
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .arguments import TrainingArguments
from .loop import TrainingDiverged
from .options import (
    ADVICE,
    ALIASES,
    converted,
    default_of,
    gathered,
    kind_of,
    merged,
    options_within,
)

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_METAVARS: dict[type, str] = {
    int: "N",
    float: "X",
    list: "TEXT",
    dict: "NAME=VALUE",
    bool: "true|false",
}

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Defaults = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Map the given arguments, from flags or file, to values that replace the dataclass's defaults."""


# ---------------------------------------------------------------- arguments


def parse_arguments(
    cls: type[Arguments],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Defaults = lambda given: {},
) -> Arguments:
    """Return the command line, and the file that `--config` names, as an instance of `cls`.

    On an error, print it with the usage, and exit.

    Args:
        cls: the dataclass of arguments.
        argv: the command line; None takes the program's own.
        description: what `--help` shows first.
        defaults: see `Defaults`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(cls, description, show_all="--help_all" in words)
    try:
        given = parser.given(words)
        return cls(**merged(gathered(cls, defaults(given)), given))
    except ValueError as error:
        parser.error(str(error))


class ArgumentParser(argparse.ArgumentParser):
    """The parser of `cls`, a dataclass of options.

    Each class that `cls` inherits options from has a group of flags; its docstring is the group's
    title.
    """

    def __init__(self, cls: type, description: str | None = None, show_all: bool = False) -> None:
        usage = "%(prog)s [--config FILE.yaml] [--FLAG VALUE …]"
        raw: Any = argparse.RawDescriptionHelpFormatter
        super().__init__(
            usage=usage, description=description, formatter_class=raw, allow_abbrev=False
        )
        self._cls = cls
        self._hints = typing.get_type_hints(cls)
        self._fields = {field.name: field for field in dataclasses.fields(cls)}
        self._add_options(show_all)
        about = "Arguments as YAML, over which flags win. A core_module in it is code that runs: use files you trust."
        self.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help=about)
        about = "Show all options and exit; --help shows the common ones."
        self.add_argument("--help_all", action="help", help=about)

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """Return {argument: value} of the command line `words`, merged over the file that it names.

        Raises:
            ValueError: unknown flag or key, or a value of another type.
        """
        found, unknown = self.parse_known_args([_underscored(word) for word in words])
        flags = [word[2:].partition("=")[0] for word in unknown if word.startswith("--")]
        if flags:
            raise ValueError("; ".join(self._advice(flag) for flag in flags))
        if unknown:
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
        values = vars(found)
        file = values.pop("config", None)
        below = {}
        if file is not None:
            below = self._converted(f"--config {file}: ", self._read(file))
        return merged(below, self._converted("argument --", values))

    def _read(self, path: str) -> dict[str, Any]:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--config {path} can't be read as YAML: {reason}") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"--config {path} must hold `key: value` lines, got {type(content).__name__}"
            )
        for key in content:
            if key not in self._fields or not self._fields[key].init:
                raise ValueError(f"--config {path}: {self._advice(str(key))}")
        return content

    def _converted(self, origin: str, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            metadata = self._fields[name].metadata
            found[name] = converted(origin + name, value, self._hints[name], metadata)
        return found

    def _advice(self, name: str) -> str:
        """Return what to do about an unknown flag or key."""
        positive = name.removeprefix("no_")
        if positive in self._fields:
            container = self._fields[positive].metadata["within"]
            if container:
                return f"--{positive}: give --{container} {positive}=VALUE."
        if positive in ADVICE:
            return f"--{positive}: {ADVICE[positive]}"
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(name, flags, n=1)
        if ALIASES.get(name) in flags:
            near = [ALIASES[name]]
        meant = f"did you mean --{near[0]}?" if near else "--help_all lists the known ones."
        return f"unrecognized --{name}: {meant}"

    def _add_options(self, show_all: bool) -> None:
        left = {name: field for name, field in self._fields.items() if field.init}
        for owner in self._cls.__mro__:  # a class may declare an inherited field anew
            names = [name for name in inspect.get_annotations(owner) if name in left]
            if names:
                group = self._group((owner.__doc__ or "").strip().partition("\n")[0])
                for name in names:
                    self._add_option(group, left.pop(name), show_all)

    def _group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group of that title, which several classes may share."""
        for group in self._action_groups:
            if group.title == title:
                return group
        return self.add_argument_group(title)

    def _add_option(
        self, group: argparse._ArgumentGroup, field: dataclasses.Field, show_all: bool
    ) -> None:
        kind, choices = kind_of(self._hints[field.name]), field.metadata["choices"]
        # no default, so that the parser returns only what was given
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        text = argparse.SUPPRESS
        if show_all or not field.metadata["rare"]:
            lines = [_help_of(field)]
            for name, part in options_within(self._cls, field.name).items():
                lines.append(f"{name}: {_help_of(part)}")
            text = "\n".join(lines)
        metavar = "{" + ",".join(choices) + "}" if choices else _METAVARS.get(kind, "TEXT")
        settings: dict[str, Any] = {}
        if kind is bool:
            settings = {"nargs": "?", "const": True}
            group.add_argument(
                f"--no_{field.name}", action="store_false", help=argparse.SUPPRESS, **common
            )
        elif field.metadata["bare"] is not None:
            settings = {"nargs": "?", "const": field.metadata["bare"]}
        elif kind is list:
            settings = {"nargs": "+"}
        elif kind is dict:
            settings = {"nargs": "+", "action": "extend"}
        group.add_argument(f"--{field.name}", metavar=metavar, help=text, **common, **settings)


def _underscored(word: str) -> str:
    """Return `word` with underscores for hyphens in the flag's name, if it is a flag."""
    flag = re.match(r"--[\w-]+", word)
    if flag is None:
        return word
    return "--" + flag[0][2:].replace("-", "_") + word[flag.end() :]


def _help_of(field: dataclasses.Field) -> str:
    default = default_of(field)
    shown = ",".join(default) if isinstance(default, (list, dict)) else str(default)
    if default is None or isinstance(default, bool):
        shown = shown.lower()
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    return f"{field.metadata['help']}{unit} (default: {shown or 'none'})".replace("%", "%%")


# ---------------------------------------------------------------- the command


def run_command(
    main: Callable[[Arguments], Any],
    arguments: type[Arguments],
    about: str | None,
    defaults: Defaults,
) -> None:
    """Log progress (first process) and warnings (all), read the command line, and call `main`.

    With --check, the command `nara check` gets the arguments instead of `main`.

    Args:
        arguments: the dataclass of arguments.
        about: what `--help` shows first.
        defaults: see `Defaults`.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    # accelerate logs a line for each file of a checkpoint
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # `accelerate launch` of one process doesn't forward SIGTERM: ask for one when it dies
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
        package = Path(__file__).resolve().parents[1]
        if package not in origin.parents:
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
