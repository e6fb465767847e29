"""The fields of a dataclass of arguments, each declared with `option(default, help, …)`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    rare: bool = False,
    within: str = "",
    resumable: bool = False,
    content: str = "",
    sentences: bool = False,
) -> Any:
    """Declare one argument.

    Args:
        default: its value when neither the file nor a flag sets it; a list or dict is copied for each instance.
        help: one sentence for `--help`.
        unit: what a number counts, for `--help`.
        choices: the words that are allowed.
        rare: True if `--help_all` alone shows it.
        within: the dict argument whose NAME=VALUE sets it, in place of a flag.
        resumable: True if a resumed run may have another value than the run that it continues.
        content: what the value is the name of, as `Run` keeps a digest of it, such as "training data": a resumed run
            may give another name for the same content.
        sentences: for a list: each word of the command line, quoted there, is one element with its spaces and commas.
    """
    metadata = {"help": help, "unit": unit, "choices": tuple(choices), "rare": rare, "within": within}
    metadata |= {"resumable": resumable, "content": content, "sentences": sentences}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy(default), metadata=metadata, init=not within)
    return dataclasses.field(default=default, metadata=metadata, init=not within)


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`; where both have a dict of the same name, its entries one by one."""
    both = {name for name in low.keys() & high.keys() if isinstance(low[name], dict)}
    return {**low, **high, **{name: {**low[name], **high[name]} for name in both}}


def gathered(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of fields that are declared `within` a dict put into that dict."""
    found: dict[str, Any] = dict(values)
    for field in dataclasses.fields(cls):
        if (container := field.metadata["within"]) and field.name in found:
            found[container] = found.get(container, {}) | {field.name: found.pop(field.name)}
    return found


def given_arguments(args: Any) -> dict[str, Any]:
    """{name: value} by which `args`, a dataclass of options, can be made again."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}


def hint(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown `name`: what may be meant, or what there is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}."
