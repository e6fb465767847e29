"""The command line of both train scripts: options, flags, the YAML file and one-line errors.

An option is a field of a dataclass of arguments, declared with `option(default, help, …)`:

    bool               --flag, --no_flag, --flag true
    list[str]          words separated by spaces or commas; with `sentences`, quoted texts
    dict[str, Any]     NAME=VALUE …, values as JSON or else YAML; several flags and the file combine
    X | None           also takes `none`

A field that is declared `within` a dict has no flag; a NAME=VALUE of that dict sets it
(`spread_options`). Flags win over the file given as `--config`, and the file wins over the
defaults. Both are checked in the same way. `--help` shows the common options, `--help_all` all
options. Hyphens in a flag count as underscores.

An error that this package raises is shown as one line that says what to do. Any other error keeps
its traceback. Ctrl-C and SIGTERM, which Slurm and Kubernetes send before they kill a process, are
also reported in one line. During training, either one finishes the current step and saves.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import difflib
import inspect
import json
import logging
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from transformers.hf_argparser import string_to_bool

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

_EXPECTED: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}
_METAVARS: dict[type, str] = {
    int: "N",
    float: "X",
    list: "TEXT",
    dict: "NAME=VALUE",
    bool: "true|false",
}
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

Arguments = TypeVar("Arguments", bound="DataclassInstance")
Defaults = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Map the given arguments, from flags or file, to new defaults for the other arguments."""


# ---------------------------------------------------------------- declarations


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    rare: bool = False,
    within: str = "",
    sentences: bool = False,
    bare: str | None = None,
) -> Any:
    """Declare one argument.

    Args:
        default: the value without file or flag; each instance gets its own copy of a list or dict.
        help: one sentence for `--help`.
        unit: the unit of a number, for `--help`.
        choices: the allowed words.
        rare: True if only `--help_all` shows the argument.
        within: the dict argument that sets this argument by NAME=VALUE, instead of a flag.
        sentences: True if each word on the command line is one element of the list, spaces and
            commas included.
        bare: the value if the flag is given without a value.
    """
    metadata = {"help": help, "unit": unit, "choices": choices, "rare": rare}
    metadata |= {"within": within, "sentences": sentences, "bare": bare}
    has_flag = not within
    if isinstance(default, (list, dict)):
        copied = lambda: copy(default)  # noqa: E731
        return dataclasses.field(default_factory=copied, metadata=metadata, init=has_flag)
    return dataclasses.field(default=default, metadata=metadata, init=has_flag)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field that `option` declared."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def given_arguments(args: DataclassInstance) -> dict[str, Any]:
    """Return the {name: value} needed to rebuild `args`, a dataclass of options."""
    fields = dataclasses.fields(args)
    return {field.name: getattr(args, field.name) for field in fields if field.init}


# ---------------------------------------------------------------- options within a dict


def _options_within(cls: type | DataclassInstance, container: str) -> dict[str, dataclasses.Field]:
    """Return {name: field} of the fields that are declared `within` the dict `container`."""
    fields = dataclasses.fields(cls)
    return {field.name: field for field in fields if field.metadata["within"] == container}


def gathered(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, with each field that is declared `within` a dict moved into that dict."""
    found: dict[str, Any] = dict(values)
    for field in dataclasses.fields(cls):
        container = field.metadata["within"]
        if container and field.name in found:
            found[container] = found.get(container, {}) | {field.name: found.pop(field.name)}
    return found


def spread_options(args: DataclassInstance) -> None:
    """Set the fields declared `within` a dict from that dict. Call this first in `__post_init__`.

    Raises:
        ValueError: a dict has an unknown name, or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(args))
    containers = {field.metadata["within"]: None for field in dataclasses.fields(args)}
    for container in filter(None, containers):
        known = _options_within(args, container)
        for name, value in getattr(args, container).items():
            if name not in known:
                raise ValueError(f"{container} has no {name!r}: {hint(name, known)}")
            origin = f"{container}: {name}"
            setattr(args, name, converted(origin, value, hints[name], known[name].metadata))


def hint(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown `name`: the nearest known name, or all names."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}."


# ---------------------------------------------------------------- values


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return `low` updated with `high`. If both have a dict under one name, merge the two dicts.

    If `high` has epochs, drop the steps of `low`; steps would otherwise win.
    """
    values = dict(low)
    if high.get("num_train_epochs") is not None:
        values.pop("max_train_steps", None)
    for name, value in high.items():
        below = values.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            value = {**below, **value}
        values[name] = value
    return values


def _kind_of(annotation: Any) -> type:
    """Return the type in an annotation like `list[str] | None`.

    It is int, float, str, bool, list or dict.
    """
    if type(None) in typing.get_args(annotation):
        [annotation] = [each for each in typing.get_args(annotation) if each is not type(None)]
    return typing.get_origin(annotation) or annotation


def converted(origin: str, value: Any, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    """Return `value` converted to the annotated type.

    Args:
        origin: the source of the value, for errors.
        value: words of the command line, or a value from JSON or YAML.
        metadata: the metadata of the field; see `option`.

    Raises:
        ValueError: the value can't be converted, or isn't one of the choices.
    """
    kind, optional = _kind_of(annotation), type(None) in typing.get_args(annotation)
    words = value if isinstance(value, list) else [value]
    if optional and [str(word).lower() for word in words] == ["none"]:
        return None
    if kind is dict:
        return value if isinstance(value, dict) else _read_settings(origin, words)
    if kind is list:
        return words if metadata["sentences"] else _split_words(words)
    text = str(value)
    if value is None or isinstance(value, bool):
        text = text.lower()  # as YAML writes it
    choices = metadata["choices"]
    if choices and text not in choices:
        raise ValueError(f"{origin}: {text!r} is none of {', '.join(choices)}")
    try:
        return string_to_bool(text) if kind is bool else kind(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"{origin} is {text!r}, expected {_EXPECTED[kind]}") from None


def _split_words(words: Sequence[Any]) -> list[str]:
    """Return `words`, split at commas and spaces."""
    parts: list[str] = []
    for word in words:
        parts += str(word).replace(",", " ").split()
    return parts


def _read_settings(origin: str, words: Sequence[Any]) -> dict[str, Any]:
    """Return {name: value} from words like NAME=VALUE, or from a JSON object."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = str(word).partition("=")
        if name.startswith("{"):
            values |= json.loads(word)
        elif not equals or not name.isidentifier():
            raise ValueError(f"{origin}: expected NAME=VALUE, got {word!r}")
        else:
            values[name] = _read_value(text)
    return values


def _read_value(text: str) -> Any:
    """Return a value read as JSON, or else as YAML. YAML alone would read 1e-4 as a text."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text.lower() == "none" else yaml.safe_load(text)


# ---------------------------------------------------------------- the parser


def parse_arguments(
    cls: type[Arguments],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Defaults = lambda given: {},
) -> Arguments:
    """Return the arguments of the command line and of the file `--config` as an instance of `cls`.

    If there is an error, print the error and the usage, and exit.

    Args:
        cls: the dataclass of arguments.
        argv: the command line; None means the program's own.
        description: the first text that `--help` shows.
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

    Each class that `cls` inherits options from becomes a group of flags. The docstring of the class
    is the title of the group.
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
        """Return {argument: value} of the command line `words`, which override the config file.

        Raises:
            ValueError: a flag or key is unknown, or a value has the wrong type.
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
        """Return advice about an unknown flag or key."""
        positive = name.removeprefix("no_")
        if positive in self._fields:
            container = self._fields[positive].metadata["within"]
            if container:
                return f"--{positive}: give --{container} {positive}=VALUE."
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(name, flags, n=1)
        meant = f"did you mean --{near[0]}?" if near else "--help_all lists the known ones."
        return f"unrecognized --{name}: {meant}"

    def _add_options(self, show_all: bool) -> None:
        left = {name: field for name, field in self._fields.items() if field.init}
        for owner in self._cls.__mro__:  # a class may redeclare an inherited field
            names = [name for name in inspect.get_annotations(owner) if name in left]
            if names:
                group = self._group((owner.__doc__ or "").strip().partition("\n")[0])
                for name in names:
                    self._add_option(group, left.pop(name), show_all)

    def _group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group with this title; several classes may share a group."""
        for group in self._action_groups:
            if group.title == title:
                return group
        return self.add_argument_group(title)

    def _add_option(
        self, group: argparse._ArgumentGroup, field: dataclasses.Field, show_all: bool
    ) -> None:
        kind, choices = _kind_of(self._hints[field.name]), field.metadata["choices"]
        # no default, so that the parser returns only given flags
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        text = argparse.SUPPRESS
        if show_all or not field.metadata["rare"]:
            lines = [_help_of(field)]
            for name, part in _options_within(self._cls, field.name).items():
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


class TrainingDiverged(ArithmeticError):
    """The loss or its gradient is not finite."""


def run_command(
    main: Callable[[Arguments], Any],
    arguments: type[Arguments],
    about: str | None,
    defaults: Defaults,
) -> None:
    """Log progress (first process) and warnings (all), read the command line, and call `main`.

    Args:
        arguments: the dataclass of arguments.
        about: the first text that `--help` shows.
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
        args: Any = parse_arguments(arguments, description=about, defaults=defaults)
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
