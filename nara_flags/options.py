"""Declare flags as fields of a dataclass, and convert and check their values.

bool               --flag, --no_flag, --flag true
list[str]          words separated by spaces or commas; with `sentences`, quoted texts
dict[str, Any]     NAME=VALUE …, values as JSON or else YAML
X | None           also takes `none`
Count, Share, …    a number with a range
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Annotated, Any, NamedTuple

import yaml

_EXPECTED: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}
_BOOLS: dict[str, bool] = {
    **dict.fromkeys(("true", "yes", "y", "t", "1"), True),
    **dict.fromkeys(("false", "no", "n", "f", "0"), False),
}


class Range(NamedTuple):
    """The numbers that an annotation allows."""

    expected: str
    holds: Callable[[float], bool]


_LEAST_0 = Range("at least 0", lambda value: value >= 0)
Count = Annotated[int, Range("at least 1", lambda value: value >= 1)]
NotNegativeInt = Annotated[int, _LEAST_0]
NotNegative = Annotated[float, _LEAST_0]
Positive = Annotated[float, Range("above 0", lambda value: value > 0)]
Share = Annotated[float, Range("in [0, 1]", lambda value: 0 <= value <= 1)]
Interval = Annotated[
    float,
    Range(
        "a whole number of steps, or a share below 1",
        lambda value: 0 < value < 1 or (value >= 1 and value % 1 == 0),
    ),
]
ShareBelow1 = Annotated[float, Range("in [0, 1)", lambda value: 0 <= value < 1)]


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    rare: bool = False,
    sentences: bool = False,
    bare: str | None = None,
) -> Any:
    """Declare one flag.

    Args:
        default: the value without file or flag; each instance gets its own copy of a list or dict.
        help: one sentence for `--help`.
        unit: the unit of a number, for `--help`.
        choices: the allowed words.
        rare: True if only `--help_all` shows the flag.
        sentences: True if each word on the command line is one element of the list, spaces and
            commas included.
        bare: the value if the flag is given without a value.
    """
    metadata = {"help": help, "unit": unit, "choices": choices, "rare": rare}
    metadata |= {"sentences": sentences, "bare": bare}
    return dataclasses.field(default_factory=lambda: copy(default), metadata=metadata)


def defaults_of(cls: Any) -> dict[str, Any]:
    """Return {name: default} of a dataclass of options, or of an instance of one."""
    factories: dict[str, Any] = {
        field.name: field.default_factory for field in dataclasses.fields(cls)
    }
    return {name: factory() for name, factory in factories.items()}


class Kind(NamedTuple):
    """The type of an option, read from its annotation.

    Attributes:
        type: int, float, str, bool, list or dict.
        optional: True if the option may be None.
        range: the allowed numbers; None allows all.
    """

    type: type
    optional: bool
    range: Range | None

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError for a number outside of the range."""
        if self.range is not None and value is not None and not self.range.holds(value):
            raise ValueError(f"{name} must be {self.range.expected}, got {value}.")


def kinds_of(cls: type) -> dict[str, Kind]:
    """Return {name: kind} of a dataclass of options."""
    return {
        name: _kind(annotation)
        for name, annotation in typing.get_type_hints(cls, include_extras=True).items()
    }


def _kind(annotation: Any) -> Kind:
    optional = type(None) in typing.get_args(annotation)
    if optional:
        [annotation] = [part for part in typing.get_args(annotation) if part is not type(None)]
    metadata = getattr(annotation, "__metadata__", (None,))
    annotation = getattr(annotation, "__origin__", annotation)  # of Annotated, list[…] and dict[…]
    return Kind(annotation, optional, metadata[0])


def check_ranges(args: Any) -> None:
    """Raise ValueError for the first number in a dataclass of options that is out of its range."""
    for name, kind in kinds_of(type(args)).items():
        kind.check(name, getattr(args, name))


def converted(origin: str, value: Any, kind: Kind, metadata: Mapping[str, Any]) -> Any:
    """Return `value` converted to its option's type.

    Args:
        origin: the source of the value, for errors.
        value: words of the command line, or a value from YAML.
        metadata: the metadata of the field; see `option`.

    Raises:
        ValueError: the value can't be converted, is out of range, or isn't one of the choices.
    """
    words = value if isinstance(value, list) else [value]
    if kind.optional and [str(word).lower() for word in words] == ["none"]:
        return None
    if kind.type is dict:
        return value if isinstance(value, dict) else _read_settings(origin, words)
    if kind.type is list:
        return words if metadata["sentences"] else _split_words(words)
    text = str(value)
    if value is None or isinstance(value, bool):
        text = text.lower()  # as YAML writes it
    choices = metadata["choices"]
    if choices and text not in choices:
        raise ValueError(f"{origin}: {text!r} is none of {', '.join(choices)}")
    try:
        number = _BOOLS[text.lower()] if kind.type is bool else kind.type(text)
    except (KeyError, ValueError):
        raise ValueError(f"{origin} is {text!r}, expected {_EXPECTED[kind.type]}") from None
    kind.check(origin, number)
    return number


def _split_words(words: Sequence[Any]) -> list[str]:
    """Return `words`, split at commas and spaces."""
    parts: list[str] = []
    for word in words:
        parts += str(word).replace(",", " ").split()
    return parts


def _read_settings(origin: str, words: Sequence[Any]) -> dict[str, Any]:
    """Return {name: value} from words like NAME=VALUE."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = str(word).partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{origin}: expected NAME=VALUE, got {word!r}")
        values[name] = _read_value(text)
    return values


def _read_value(text: str) -> Any:
    """Return a value read as JSON, or else as YAML. YAML alone would read 1e-4 as a text."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text.lower() == "none" else yaml.safe_load(text)
