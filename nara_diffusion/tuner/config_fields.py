"""The allowed values of each field of a `NaraConfig`, checked before PEFT reads them: a file may hold any type."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from itertools import pairwise
from numbers import Integral
from types import NoneType
from typing import Any

from peft import TaskType

from nara_diffusion.limits import LARGEST_NUMBER, SMALLEST_SCALE, is_number
from nara_diffusion.noise.schedulers.prediction import KINDS

LARGEST_SIZE = 2**16
"""Of a rank, a width or a number of parts: beyond any layer, and small enough that no product overflows."""

LARGEST_MATRIX = 2**32
"""Entries of one matrix of a core, 16 GiB in float32."""

_Holds = Callable[[Any], bool]


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises ValueError, with the field's name, if a field has a value that no configuration can have."""
    for name, (holds, expected) in _FIELDS.items():
        if name in values and not holds(values[name]):
            raise ValueError(f"{name} is {_shown(values[name])}: pass {expected}.")


def check_core_size(widths: tuple[int, ...], rank: int, fields: str) -> None:
    """Raises ValueError if a core of these layer widths has a matrix that is too large for any memory."""
    entries = max(d_in * d_out for d_in, d_out in pairwise(widths))
    if entries > LARGEST_MATRIX:
        raise ValueError(
            f"{fields}, with rank {rank}, makes a core with a matrix of {entries} entries: pass sizes for which there "
            f"are at most {LARGEST_MATRIX}."
        )


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list too deep
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 100 else f"{text[:100]}…"


# ---------------------------------------------------------------- what holds


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and 0 < value <= LARGEST_SIZE


def _is_index(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_a(kind: type) -> _Holds:
    return lambda value: isinstance(value, kind)


_is_text, _is_none = _is_a(str), _is_a(NoneType)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


def _some_of(holds: _Holds) -> _Holds:
    return lambda value: isinstance(value, (list, tuple, set, frozenset)) and all(map(holds, value))


def _by(key: _Holds, holds: _Holds) -> _Holds:
    return lambda value: isinstance(value, dict) and all(map(key, value)) and all(map(holds, value.values()))


def _any_of(*kinds: _Holds) -> _Holds:
    return lambda value: any(holds(value) for holds in kinds)


def _is_scheduler(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("_class_name"), str)
        and value.get("prediction_type") in (None, *KINDS)
    )


# ---------------------------------------------------------------- of which field

_Rule = tuple[_Holds, str]
_SIZE: _Rule = (_is_size, f"a positive integer of at most {LARGEST_SIZE}")
_SCALE: _Rule = (
    lambda value: is_number(value) and value >= SMALLEST_SCALE,
    f"a finite number greater than 0, from {SMALLEST_SCALE:g} to {LARGEST_NUMBER:g}",
)
_FLAG: _Rule = (_is_a(bool), "True or False")
_TEXT: _Rule = (_any_of(_is_none, _is_text), "a text, or None")
_PATH: _Rule = (lambda value: value is None or isinstance(value, (str, os.PathLike)), "a name, or None")
_DICT: _Rule = (_any_of(_is_none, _is_a(dict), is_dataclass), "a dictionary, or None")
_MODULES: _Rule = (
    _any_of(_is_none, _is_pattern, _some_of(_is_text)),
    "names of modules as a list of texts, one valid regular expression, or None",
)
_PATTERNS: _Rule = (
    _any_of(_is_none, _is_pattern, _some_of(_is_pattern)),
    "valid regular expressions as a list of texts, or None",
)
_INDICES: _Rule = (
    _any_of(_is_none, _is_index, _some_of(_is_index)),
    "an integer that is not negative, a list of such, or None",
)

_FIELDS: dict[str, _Rule] = {
    # PEFT's bookkeeping
    "task_type": (lambda value: value is None or value in list(TaskType), f"one of {', '.join(TaskType)}, or None"),
    "auto_mapping": _DICT,
    "peft_version": _TEXT,
    "base_model_name_or_path": _PATH,
    "revision": _TEXT,
    "inference_mode": _FLAG,
    # LoRA's
    "r": _SIZE,
    "lora_alpha": (is_number, f"a finite number of at most {LARGEST_NUMBER:g}"),
    "lora_dropout": (
        lambda value: is_number(value) and 0 <= value < 1,
        "a number from 0 to less than 1",
    ),
    "target_modules": _MODULES,
    "exclude_modules": _MODULES,
    "modules_to_save": (_any_of(_is_none, _some_of(_is_pattern)), "a list of names, or None"),  # PEFT iterates over it
    "layers_pattern": _PATTERNS,
    "layers_to_transform": _INDICES,
    "rank_pattern": (
        _any_of(_is_none, _by(_is_pattern, _is_size)),
        f"a dictionary from valid regular expressions to positive integers of at most {LARGEST_SIZE}",
    ),
    "alpha_pattern": (
        _any_of(_is_none, _by(_is_pattern, is_number)),
        f"a dictionary from valid regular expressions to finite numbers of at most {LARGEST_NUMBER:g}",
    ),
    "trainable_token_indices": (
        _any_of(_is_none, _some_of(_is_index), _by(_is_text, _some_of(_is_index))),
        "a list of token ids, a dictionary from names of embeddings to such lists, or None",
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "fan_in_fan_out": _FLAG,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "use_qalora": _FLAG,
    "ensure_weight_tying": _FLAG,
    "qalora_group_size": _SIZE,
    "megatron_core": _TEXT,
    "megatron_config": _DICT,
    "loftq_config": _DICT,
    "eva_config": _DICT,
    "corda_config": _DICT,
    "lora_ga_config": _DICT,
    "velora_config": _DICT,
    "monteclora_config": _DICT,
    "arrow_config": _DICT,
    "kasa_config": _DICT,
    "use_bdlora": _DICT,
    "target_parameters": (_any_of(_is_none, _some_of(_is_text)), "a list of texts, or None"),
    "alora_invocation_tokens": (_any_of(_is_none, _some_of(_is_index)), "a list of token ids, or None"),
    "layer_replication": (
        _any_of(_is_none, _some_of(lambda pair: _some_of(_is_index)(pair) and len(pair) == 2)),
        "a list of pairs of layers, or None",
    ),
    # NaRA's
    "core_hidden_dims": (
        lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and _some_of(_is_size)(value),
        f"one positive integer of at most {LARGEST_SIZE} a hidden layer",
    ),
    "core_scale": _SCALE,
    "fourier_scale": _SCALE,
    "noise_embedding_dim": _SIZE,
    "mask_density_radius": _SIZE,
    "core_bins": _SIZE,
    "core_knots": _SIZE,
    "noise_convention": (
        lambda value: value is None or (_is_text(value) and value != ""),
        "the name of λ's definition, or None if unknown",
    ),
    "scheduler": (
        _any_of(_is_none, _is_scheduler),
        "the configuration of a scheduler of Diffusers, with its _class_name and, if it has a prediction_type, one of "
        f"{', '.join(KINDS)}; or None",
    ),
}
