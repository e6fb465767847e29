"""Read the command line and the YAML file of a train script, and show its help.

Flags win over the file given as `--config`, and the file wins over the defaults. Both are checked
in the same way. Hyphens in a flag count as underscores. `--help` shows the common flags, and
`--help_all` shows all of them.

A train script reads its flags before it imports anything slow:

    flags = read_flags(TextFlags)                            # exits if a flag or a value is wrong
    args = Arguments(**merged(shipped_run(flags), flags))    # defaults may depend on the model
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from .hints import FORMER_DICTS, OTHERS
from .options import converted, defaults_of, kinds_of

_METAVARS: dict[type, str] = {
    int: "N",
    float: "X",
    list: "TEXT",
    dict: "NAME=VALUE",
    bool: "true|false",
}

Arguments = TypeVar("Arguments")
Defaults = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Map the arguments that flags or file give to new defaults for the other arguments."""


def read_flags(
    cls: type, words: Sequence[str] | None = None, about: str | None = None
) -> dict[str, Any]:
    """Return {argument: value} of the command line and of its `--config` file.

    If there is a mistake, print it as one line that starts with `error:`, and exit.

    Args:
        cls: the dataclass of options.
        words: the command line; None means the program's own.
        about: the first text that `--help` shows; None means the docstring of `cls`.
    """
    words = list(sys.argv[1:] if words is None else words)
    parser = ArgumentParser(cls, about or inspect.getdoc(cls), show_all="--help_all" in words)
    try:
        return parser.read(words)
    except ValueError as error:
        parser.error(str(error))


def parse_arguments(
    cls: type[Arguments],
    words: Sequence[str] | None = None,
    defaults: Defaults = lambda flags: {},
) -> Arguments:
    """Return the command line as an instance of `cls`. See `read_flags`."""
    flags = read_flags(cls, words)
    return cls(**merged(defaults(flags), flags))


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


def hint(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown `name`: the nearest known name, or all names."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}."


def read_yaml(path: str, origin: str) -> Any:
    """Return the content of a YAML file. Raise ValueError, with its `origin`, if it can't be read."""
    try:
        return yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{origin} can't be read as YAML: {reason}") from error


def without_dicts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file by version 0.2 with its dicts of options as plain options."""
    plain = {name: value for name, value in values.items() if name not in FORMER_DICTS}
    for name in FORMER_DICTS:
        plain |= values.get(name) or {}
    return plain


class ArgumentParser(argparse.ArgumentParser):
    """The parser of `cls`, a dataclass of options.

    Each class that `cls` inherits options from becomes a group of flags. The first line of the
    class's docstring is the title of the group.
    """

    def __init__(self, cls: type, about: str | None = None, show_all: bool = False) -> None:
        usage = "%(prog)s [--config FILE.yaml] [--FLAG VALUE …]"
        raw: Any = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=usage, description=about, formatter_class=raw, allow_abbrev=False)
        self._cls = cls
        self._kinds = kinds_of(cls)
        self._fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(cls)}
        self._add_options(show_all)
        text = "Arguments as YAML, over which flags win. A core_module in it is code that runs: use files you trust."
        self.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help=text)
        text = "Show all options and exit; --help shows the common ones."
        self.add_argument("--help_all", action="help", help=text)

    def error(self, message: str) -> NoReturn:
        """Print the mistake as one line, and exit."""
        self.exit(2, f"error: {message}\n")

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Return {argument: value} of the command line `words`, which override the config file.

        Raises:
            ValueError: a flag or key is unknown, or a value has the wrong type.
        """
        namespace, unknown = self.parse_known_args([_underscored(word) for word in words])
        flags = [word for word in unknown if word.startswith("--")]
        if flags:
            raise ValueError("; ".join(map(self._advice, flags)))
        if unknown:
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
        values = vars(namespace)
        file = values.pop("config", None)
        below = {}
        if file is not None:
            below = self._converted(f"--config {file}: ", self._read_file(file))
        return merged(below, self._converted("argument --", values))

    def _read_file(self, path: str) -> dict[str, Any]:
        content = read_yaml(path, f"--config {path}")
        if not isinstance(content, dict):
            raise ValueError(
                f"--config {path} must hold `key: value` lines, got {type(content).__name__}"
            )
        content = without_dicts(content)
        for key in content:
            if key not in self._fields:
                raise ValueError(f"--config {path}: {self._advice(f'--{key}')}")
        return content

    def _converted(self, origin: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: converted(origin + name, value, self._kinds[name], self._fields[name].metadata)
            for name, value in values.items()
        }

    def _advice(self, flag: str) -> str:
        """Return advice about an unknown flag or key; `flag` is two hyphens and the name."""
        flag = flag.partition("=")[0]
        name = flag[2:]
        flags = [word[2:] for word in self._option_string_actions if word.startswith("--")]
        here = OTHERS.get(name)
        if here and set(re.findall(r"--(\w+)", here)) <= set(flags):
            return f"unrecognized {flag}: here it is {here}"
        near = difflib.get_close_matches(name, flags, n=1)
        advice = f"did you mean --{near[0]}?" if near else "--help_all lists the known ones."
        return f"unrecognized {flag}: {advice}"

    def _add_options(self, show_all: bool) -> None:
        defaults = defaults_of(self._cls)
        left = dict(self._fields)
        groups: dict[str, argparse._ArgumentGroup] = {}  # several classes may share one
        for owner in self._cls.__mro__:  # a class may redeclare an inherited field
            title = (owner.__doc__ or "").strip().partition("\n")[0]
            for name in inspect.get_annotations(owner):
                if name not in left:
                    continue
                if title not in groups:
                    groups[title] = self.add_argument_group(title)
                field = left.pop(name)
                shown = show_all or not field.metadata["rare"]
                text = _help_of(field, defaults[name]) if shown else argparse.SUPPRESS
                self._add_option(groups[title], field, text)

    def _add_option(
        self, group: argparse._ArgumentGroup, field: dataclasses.Field, text: str
    ) -> None:
        kind, choices = self._kinds[field.name].type, field.metadata["choices"]
        # no default, so that the parser returns only given flags
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
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
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _help_of(field: dataclasses.Field, default: Any) -> str:
    text = ",".join(default) if isinstance(default, (list, dict)) else str(default)
    if default is None or isinstance(default, bool):
        text = text.lower()
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    return f"{field.metadata['help']}{unit} (default: {text or 'none'})".replace("%", "%%")
