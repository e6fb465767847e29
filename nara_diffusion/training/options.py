"""Options: fields of a dataclass of arguments, and their values as the annotated types.

Each field is declared with `option(default, help, …)`. A value comes from a flag or from a YAML
file:

    bool               --flag, --no_flag, --flag true
    list[str]          words separated by spaces or commas; with `sentences`, quoted texts
    dict[str, Any]     NAME=VALUE …, values as JSON, else as YAML; several flags and the file add up
    X | None           also takes `none`

A field that is declared `within` a dict has no flag: a NAME=VALUE of that dict sets it
(`spread_options`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import yaml
from transformers.hf_argparser import string_to_bool

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_EXPECTED: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}


# ---------------------------------------------------------------- flags of other programs

ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_train_steps",
    "prompt": "instance_prompt",
}
"""{name in other programs: ours}."""
_PRODIGY = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
ADVICE: dict[str, str] = {
    **{f"prodigy_{name}": f"give --optimizer_options {name}=VALUE." for name in _PRODIGY},
    "adam_beta1": "give --optimizer_options betas=[0.9,0.999].",
    "adam_beta2": "give --optimizer_options betas=[0.9,0.999].",
    "adam_epsilon": "give --optimizer_options eps=1e-8.",
    "adam_weight_decay": "give --weight_decay.",
    "cache_dir": "set the environment variable HF_HOME instead.",
    "prediction_type": "leave it out: a model is trained as what it predicts (docs/conversion.md).",
    "push_to_hub": "give only --hub_model_id, the repository to upload to.",
    "use_8bit_adam": "give --optimizer AdamW8bit.",
    "use_dora": "give --adapter nara_dora or dora, or --adapter_options use_dora=true.",
    "validation_epochs": "give --validation_steps.",
    "validation_prompt": "give --validation_prompts.",
    "with_prior_preservation": "give only --class_data_dir and --class_prompt.",
}
"""{flag of Diffusers' or kohya's scripts: the flag to use here}."""


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
        default: its value if neither the file nor a flag sets it; a list or dict is copied for each
            instance.
        help: one sentence for `--help`.
        unit: what a number counts, for `--help`.
        choices: the words that are allowed.
        rare: True if only `--help_all` shows it.
        within: the dict argument that sets it, by NAME=VALUE instead of a flag.
        sentences: for a list: each word of the command line is one element, with its spaces and
            commas.
        bare: the value of a flag that is given without one.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": choices,
        "rare": rare,
        "within": within,
        "sentences": sentences,
        "bare": bare,
    }
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
    """Return {name: value} that can rebuild `args`, a dataclass of options."""
    fields = dataclasses.fields(args)
    return {field.name: getattr(args, field.name) for field in fields if field.init}


# ---------------------------------------------------------------- options within a dict


def options_within(cls: type | DataclassInstance, container: str) -> dict[str, dataclasses.Field]:
    """Return {name: field} of the fields that are declared `within` the dict `container`."""
    fields = dataclasses.fields(cls)
    return {field.name: field for field in fields if field.metadata["within"] == container}


def gathered(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, with those of fields declared `within` a dict moved into that dict."""
    found: dict[str, Any] = dict(values)
    for field in dataclasses.fields(cls):
        container = field.metadata["within"]
        if container and field.name in found:
            found[container] = found.get(container, {}) | {field.name: found.pop(field.name)}
    return found


def spread_options(args: DataclassInstance) -> None:
    """Set fields declared `within` a dict from that dict. Call it first in `__post_init__`.

    Raises:
        ValueError: a dict has another name, or a value of another type.
    """
    hints = typing.get_type_hints(type(args))
    containers = {field.metadata["within"]: None for field in dataclasses.fields(args)}
    for container in filter(None, containers):
        known = options_within(args, container)
        for name, value in getattr(args, container).items():
            if name not in known:
                raise ValueError(f"{container} has no {name!r}: {hint(name, known)}")
            origin = f"{container}: {name}"
            setattr(args, name, converted(origin, value, hints[name], known[name].metadata))


def hint(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown `name`: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}."


# ---------------------------------------------------------------- values


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `high` over those of `low`. If both have a dict, merge its entries.

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


def kind_of(annotation: Any) -> type:
    """Return the type in an annotation like `list[str] | None`.

    It is int, float, str, bool, list or dict.
    """
    if isinstance(annotation, types.UnionType):
        [annotation] = [each for each in typing.get_args(annotation) if each is not type(None)]
    return typing.get_origin(annotation) or annotation


def converted(origin: str, value: Any, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    """Return words of the command line, or a value of JSON or YAML, as the annotated type.

    Args:
        origin: where the value comes from, for errors.
        metadata: that of the field; see `option`.

    Raises:
        ValueError: the value can't be converted, or is none of the choices.
    """
    kind, optional = kind_of(annotation), isinstance(annotation, types.UnionType)
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
    """Return a value written as JSON, which reads 1e-4 as a number, or else as YAML."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text.lower() == "none" else yaml.safe_load(text)
