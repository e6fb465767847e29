"""Results in little room: each line holds the fields that differ from the line before, and only what a table shows.

The first line says so: {"form": "changes"}. Numbers are rounded to nine decimals. A field that a run lacks is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

FORM = {"form": "changes"}
DIGITS = 9

_WHAT = ("suite", "stage", "backbone", "domain", "method", "control", "seed")
_ALWAYS = (*_WHAT, "validation_loss")  # which stands where a run diverged, too
_WHERE = ("commit", "versions", "hardware", "seconds")
_FIGURES = ("validation_loss", "exact_match", "similarity", "text_alignment", "place_similarity")
_SETTINGS = ("learning_rate", "core_learning_rate", "rank", "steps", "settings")
_COST = ("trainable_parameters", "step_ms", "parameters_ratio", "step_ratio", "step_ratio_quartiles", "memory_ratio")
KEPT = {
    "main": (*_FIGURES, *_SETTINGS, "losses", "noise_levels", "validation_error"),
    "ablation": (*_FIGURES, *_SETTINGS),
    "single": _FIGURES,
    "tune": ("validation_loss", "trial", "learning_rate", "core_learning_rate"),
    "cost": _COST,
}
"""What the tables of a stage show, beside what was run and where."""
_ALL = tuple(dict.fromkeys((*_WHAT, *_WHERE, *(name for names in KEPT.values() for name in names))))


def pack(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines without their ends; `unpack` gives the records back, less what no table shows."""
    yield json.dumps(FORM)
    before: dict[str, Any] = {}
    for record in records:
        kept = {name: _rounded(record.get(name)) for name in (*_WHAT, *_WHERE, *KEPT[record["stage"]])}
        if not record.get("last", True):
            kept["seconds"] = None  # a run's time stands once, with its last record
        if kept["control"] or kept["method"] != "lora":
            kept["validation_error"] = None  # how far one run is known is said of LoRA's
        now = dict.fromkeys(_ALL) | kept
        changes = {name: value for name, value in now.items() if value != before.get(name)}
        yield json.dumps(changes, separators=(",", ":"))
        before = now


def is_packed(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a file with these lines is what `pack` wrote."""
    return list(lines[:1]) == [FORM]


def unpack(lines: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records of the lines after the first, without fields that are null."""
    state: dict[str, Any] = {}
    for line in lines:
        state = state | dict(line)
        yield {name: value for name, value in state.items() if value is not None or name in _ALWAYS}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    return [_rounded(each) for each in value] if isinstance(value, list) else value
