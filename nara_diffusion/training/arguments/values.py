"""The value of an argument: text of the command line, or a YAML value, converted to the type of its annotation."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any


def convert(name: str, value: Any, hint: Any, choices: Sequence[str] = (), sentences: bool = False) -> Any:
    """`value`, text or texts from the command line or a YAML value, as the type `hint`.

    Raises:
        ValueError: the value has another type; the message names the argument, the value and what is expected.
    """
    kind, optional, is_list = parts_of(hint)
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if is_list:
        items = value.replace(",", " ").split() if isinstance(value, str) and not sentences else value
        if not isinstance(items, (list, tuple)):
            items = [items]
        return [_scalar(name, item, kind, choices) for item in items]
    return _scalar(name, value, kind, choices)


def _scalar(name: str, value: Any, kind: type, choices: Sequence[str]) -> Any:
    wrong = ValueError(f"{name} takes {describe(kind, choices)}, got {value!r}.")
    if isinstance(value, bool) is not (kind is bool) or value is None:
        raise wrong
    if kind is int and isinstance(value, float):
        raise wrong
    try:
        result = kind(value)
    except (TypeError, ValueError):
        raise wrong from None
    if choices and result not in choices:
        raise wrong
    return result


def describe(kind: type, choices: Sequence[str]) -> str:
    if choices:
        return "one of " + ", ".join(choices)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


def default_of(field: dataclasses.Field) -> Any:
    """The default of an argument; a list of its own for each call."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def parts_of(hint: Any) -> tuple[type, bool, bool]:
    """(scalar type, may be None, is a list) of an annotation such as `int`, `float | None`, `list[str] | None`."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional, hint = True, members[0]
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], optional, True
    return hint, optional, False
