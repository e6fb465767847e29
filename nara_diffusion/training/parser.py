"""Arguments of a script: a dataclass is read from flags, from a YAML file, or from both.

Each field is declared with `option(default, help, …)`. Flags win over the file given as `--config`, the file wins over
the defaults. A file is read as the flags that it stands for, so that both have the same checks:

    bool               --flag, --no-flag, --flag true
    list[str]          words separated by spaces or commas; quoted texts, if it is one of `sentences`
    dict[str, Any]     NAME=VALUE …, values as JSON or else as YAML; several flags and the file add up
    X | None           takes `none` too

A field that is declared `within` a dict has no flag: it is set by a NAME=VALUE of that dict (`spread_options`).
`--help` shows the common options, `--help_all` all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.hf_argparser import string_to_bool

from .options import gathered, hint, merged
from .renamed import RENAMED

Arguments = TypeVar("Arguments")


def parse_arguments(
    cls: type[Arguments],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> Arguments:
    """The command line, and the file that `--config` names, as an instance of `cls`; exits with usage on an error.

    Args:
        cls: the dataclass of arguments.
        argv: the command line; None takes the program's own.
        description: what `--help` shows first.
        defaults: from the arguments that were given, by flag or file, to values in place of the dataclass's defaults.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(cls, description, show_all="--help_all" in words)
    given = parser.given(words)
    try:
        return cls(**merged(gathered(cls, defaults(given)), given))
    except ValueError as error:
        parser.error(str(error))


def build_parser(cls: type, description: str | None = None, show_all: bool = False) -> ArgumentParser:
    """The parser of `cls`: a group of flags for each class that has some, titled by the start of its docstring."""
    return ArgumentParser(cls, description, show_all)


def spread_options(args: Any) -> None:
    """Set the fields that are declared `within` a dict from that dict. Arguments call it first in `__post_init__`.

    Raises:
        ValueError: a dict has another name in it, or a value of another type.
    """
    hints = typing.get_type_hints(type(args))
    fields = {field.name: field for field in dataclasses.fields(args) if field.metadata["within"]}
    for container in {field.metadata["within"]: 0 for field in fields.values()}:
        known = {name: field for name, field in fields.items() if field.metadata["within"] == container}
        for name, value in getattr(args, container).items():
            if name not in known:
                raise ValueError(f"{container} has no {name!r}: {hint(name, known)}")
            try:
                setattr(args, name, _converted(value, hints[name], known[name].metadata["choices"]))
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"{container}: {name} is {value!r}, expected {error}") from None


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """{name: value} of words NAME=VALUE, or of one that is a JSON object.

    Raises:
        ValueError: a word is neither.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if word.startswith("{"):
            values |= json.loads(word)
        elif not equals or not name.isidentifier():
            raise ValueError(f"expected NAME=VALUE, got {word!r}")
        else:
            values[name] = _read_value(text)
    return values


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)  # which reads 1e-4 as a number
    except ValueError:
        return None if text.lower() == "none" else yaml.safe_load(text)


class ArgumentParser(argparse.ArgumentParser):
    """A parser for a dataclass of `option` fields, of which it returns those that were given."""

    def __init__(self, cls: type, description: str | None, show_all: bool) -> None:
        self._show_all, self._origin = show_all, ""
        self._within = {field.name: field.metadata["within"] for field in dataclasses.fields(cls) if not field.init}
        usage = f"%(prog)s {getattr(cls, 'positional', '')}[--config FILE.yaml] [--FLAG VALUE …]"
        raw: Any = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=usage, description=description, formatter_class=raw, allow_abbrev=False)
        self._add_options(cls)
        about = "Arguments as YAML, over which flags win. A core_module in it is code that runs: use files you trust."
        self.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help=about)
        self.add_argument("--help_all", action="help", help="Show all options and exit; --help shows the common ones.")

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """{argument: value} of the command line `words`, over those of the file that it names."""
        flags = self._parse(words)
        if (file := flags.pop("config", None)) is None:
            return flags
        return merged(self._parse(self._words_of(file), origin=f"--config {file}: "), flags)

    def error(self, message: str) -> typing.NoReturn:
        """Exit with one line, which names the file of arguments where that has the error."""
        super().error(f"{self._origin}{message}")

    def _parse(self, words: Sequence[str], origin: str = "") -> dict[str, Any]:
        self._origin = origin
        known, unknown = self.parse_known_args(list(words))
        if unknown:
            advice = "; ".join(self._advice(word) for word in unknown if word.startswith("--"))
            self.error(advice or f"unrecognized arguments: {' '.join(unknown)}")
        self._origin = ""
        return vars(known)

    def _advice(self, word: str) -> str:
        name = word[2:].partition("=")[0].replace("-", "_")
        old = name.removeprefix("no_")
        if old in self._within:
            return f"--{old}: give --{self._within[old]} {old}=VALUE."
        if old in RENAMED:
            return f"--{old}: {RENAMED[old]}"
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(name, flags, n=1)
        return f"unrecognized --{name}: " + (
            f"did you mean --{near[0]}?" if near else "--help_all lists the known ones."
        )

    def _words_of(self, path: str) -> list[str]:
        """The command line that a YAML file stands for."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"--config {path} can't be read: {error.strerror}")
        except yaml.YAMLError as error:
            self.error(f"--config {path} is not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(content, dict):
            self.error(f"--config {path} must hold `key: value` lines, got {type(content).__name__}")
        words: list[str] = []
        for key, value in content.items():
            action = self._option_string_actions.get(f"--{key}")
            if isinstance(value, list) and action is not None and action.nargs == "+":
                words += [f"--{key}", *map(str, value)]
            elif isinstance(value, dict):
                words += [f"--{key}={json.dumps(value)}"]
            else:
                words += [f"--{key}={str(value).lower() if value in (None, True, False) else value}"]
        return words

    def _add_options(self, cls: type) -> None:
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        inner = [field for field in fields.values() if not field.init]
        groups: dict[str, Any] = {}
        for owner in cls.__mro__:
            own = [fields[name] for name in inspect.get_annotations(owner) if name in fields]
            title = (owner.__doc__ or "").strip().partition("\n")[0]
            for field in own:
                group = groups[title] if title in groups else groups.setdefault(title, self.add_argument_group(title))
                fields.pop(field.name)  # a class may declare an inherited one anew
                if field.init:
                    within = [each for each in inner if each.metadata["within"] == field.name]
                    self._add_option(group, field, hints[field.name], within)

    def _add_option(self, group: Any, field: dataclasses.Field, hint: Any, within: Sequence[dataclasses.Field]) -> None:
        own, (kind, optional) = field.metadata, _kind_of(hint)
        names = "\n".join(f"{each.name}: {_help_of(each)}" for each in within)
        shown = self._show_all or not own["rare"]
        # without a default, so that only what was given is returned
        settings: dict[str, Any] = {"default": argparse.SUPPRESS}
        settings["help"] = f"{_help_of(field)} {names}".strip() if shown else argparse.SUPPRESS
        if kind is bool:
            settings |= {"type": string_to_bool, "nargs": "?", "const": True, "metavar": "true|false"}
            off = {"dest": field.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(f"--no_{field.name}", f"--no-{field.name}", action="store_false", **off)
        elif kind in (list, dict):
            item = str if kind is dict else typing.get_args(_without_none(hint))[0]
            action = _action(kind, optional, own["sentences"], item)
            settings |= {"action": action, "nargs": "+", "metavar": _METAVARS.get(kind, "TEXT")}
        else:
            choices = own["choices"]
            settings |= {"type": _reader(kind, optional, choices)}
            settings["metavar"] = "{" + ",".join(choices) + "}" if choices else _METAVARS[kind]
        flag = f"--{field.name}"
        added = group.add_argument(*dict.fromkeys((flag, flag.replace("_", "-"))), **settings)
        added.option_strings = [flag]  # the one with hyphens works, and isn't shown


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", dict: "NAME=VALUE"}
_WORDS: dict[Any, str] = {int: "whole number", float: "number", str: "text"}


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(member for member in typing.get_args(hint) if member is not type(None))
    return hint


def _kind_of(hint: Any) -> tuple[type, bool]:
    """(int, float, str, bool, list or dict; may be None) of an annotation such as `float | None` or `list[str]`."""
    inner = _without_none(hint)
    return typing.get_origin(inner) or inner, isinstance(hint, types.UnionType)


def _reader(kind: type, optional: bool, choices: Sequence[str]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if choices and text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return kind(text)

    read.__name__ = _WORDS[kind]  # in argparse's message
    return read


def _converted(value: Any, hint: Any, choices: Sequence[str]) -> Any:
    """A value of JSON or YAML as the type of an annotation."""
    kind, optional = _kind_of(hint)
    if kind is list and not (optional and value is None):
        return [str(word) for word in (value if isinstance(value, list) else str(value).split(","))]
    if kind is bool or (optional and value is None):
        return value if value is None else string_to_bool(str(value).lower())
    if isinstance(value, bool) and kind is not str:
        raise ValueError(f"a {_WORDS[kind]}")
    try:
        return _reader(kind, optional, choices)(str(value))
    except ValueError:
        raise ValueError(f"a {_WORDS[kind]}") from None


def _action(kind: type, optional: bool, sentences: bool, item: Callable[[str], Any]) -> type[argparse.Action]:
    """Stores a list of words, or adds words NAME=VALUE to a dict."""

    class Store(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            try:
                if kind is dict:
                    values = {**getattr(namespace, self.dest, {}), **parse_settings(values)}
                elif optional and [value.lower() for value in values] == ["none"]:
                    values = None
                elif not sentences:
                    values = [item(word) for value in values for word in value.replace(",", " ").split()]
            except (ValueError, yaml.YAMLError) as error:
                raise argparse.ArgumentError(self, str(error)) from None
            setattr(namespace, self.dest, values)

    return Store


def _help_of(field: dataclasses.Field) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, (list, dict)):
        default = ",".join(map(str, default))
    shown = str(default).lower() if default is None or isinstance(default, bool) else str(default)
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    return f"{field.metadata['help']}{unit} (default: {shown or 'none'})".replace("%", "%%")
