"""Check the types of a dataclass's values by its annotations, as leniently as PEFT's users need.

An annotation `int` or `float` accepts any real number but a bool, `list`, `tuple` and `set` accept
each other, a configuration's class accepts a dict of its fields, and a Literal any value of its
choices' types. None always fits: it means unset.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from numbers import Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

_KINDS: dict[object, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((Real,), "a number"),
    float: ((Real,), "a number"),
    str: ((str, os.PathLike), "a string"),
    dict: ((Mapping,), "a dict"),
    list: ((Collection,), "a list"),
    tuple: ((Collection,), "a list"),
}
"""{annotation: (types of values that fit it, its name in messages)}."""


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value may stand in a field with that annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if value is None or annotation is Any:
        return True
    if origin is Literal:
        return isinstance(value, tuple({type(choice) for choice in arguments}))
    if _is_union(annotation):
        return any(fits(value, argument) for argument in arguments)
    kind = origin or annotation
    if kind not in _KINDS:
        return isinstance(value, (kind, Mapping))
    types, _ = _KINDS[kind]
    if not isinstance(value, types) or isinstance(value, bool) != (kind is bool):
        return False
    if Collection not in types:
        return True
    if isinstance(value, (str, bytes, Mapping)):
        return False
    return not arguments or all(fits(item, arguments[0]) for item in value)


def described(annotation: Any) -> str:
    """Return the words for an annotation in a message, such as "a list or None"."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    if _is_union(annotation):
        words = set(map(described, get_args(annotation)))  # `typing` may have swapped them
        return " or ".join(sorted(words, key=lambda word: (word == "None", word)))
    kind = get_origin(annotation) or annotation
    if kind is type(None):
        return "None"
    return _KINDS[kind][1] if kind in _KINDS else f"a {kind.__name__}"


def _is_union(annotation: object) -> bool:
    return type(annotation) is UnionType or get_origin(annotation) is Union
