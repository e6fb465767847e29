"""Reading configurations from files. An invalid file is refused with its name, before any model is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from nara_diffusion.cores.registry import registered_cores

from .config import NaraConfig
from .config_fields import check_fields
from .peft_type import NaraPeftType

_OF_ONE_MACHINE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config",
}  # fmt: skip
"""Fields that describe where a configuration was made or runs; the other fields describe the adapter."""

_KNOWN = {field.name for field in fields(NaraConfig) if field.init}
_NARAS_OWN = {"core_type", "core_scale"}
REMOVED_FIELDS = {"core_normalization": "none", "noise_scale": "linear", "layer_embedding_dim": None}
"""Fields that files of earlier versions have → the value that stands for what every core does now; None: any value."""
_REMOVED_CORE_TYPES = ("rank_mask_pairs", "diagonal")

_ALWAYS_WRITTEN = (
    "core_type", "core_scale", "core_hidden_dims", "core_init", "core_input", "core_sharing", "noise_embedding",
    "noise_embedding_dim", "fourier_scale", "mask_density_radius", "r", "rank_pattern", "lora_alpha", "alpha_pattern",
    "use_rslora", "use_dora", "lora_bias", "bias", "init_lora_weights",
)  # fmt: skip
"""Fields that the files of every version have. A later field that a file lacks has its default."""


def parse_json(content: str | bytes, origin: str) -> dict[str, Any]:
    """Parse `content` as a JSON object. `origin` names the file in messages.

    Raises:
        ValueError: it is not a JSON object, or not UTF-8.
    """
    try:
        found = json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{origin} can't be read ({error!r}): damaged.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{origin} can't be read (a {type(found).__name__}, where JSON's object belongs): damaged.")
    return found


def refuse_repeated_keys(content: str | bytes, origin: str) -> None:
    """Raises ValueError if an object in this JSON has a key twice: readers differ in which of them they take."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{origin} has '{twice}' twice: damaged, leave one of them.")
        return found

    json.loads(content, object_pairs_hook=once)


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of an adapter_config.json, of any kind of adapter.

    Raises:
        ValueError: it is not a JSON object, or it is a NaRA's and has a field twice.
    """
    content = Path(path).read_bytes()
    given = parse_json(content, f"'{path}'")
    if is_naras(given, f"'{path}'"):
        refuse_repeated_keys(content, f"'{path}'")
    return given


def check_config_file(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for an adapter_config.json that is no JSON object, or a NaRA's and invalid."""
    given = read_config_file(path)
    if is_naras(given, f"'{path}'"):
        given = without_removed_fields(given, f"'{path}'")
        _made_of({key: value for key, value in given.items() if key in _KNOWN}, f"'{path}'")  # PEFT warns of others


def without_removed_fields(given: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The fields of a NaRA's file without those that only earlier versions had.

    Raises:
        ValueError: the core of the adapter depends on such a field, or is of a type that only those had.
    """
    used = {
        name: given[name] for name, neutral in REMOVED_FIELDS.items() if given.get(name, neutral) != neutral is not None
    }
    if given.get("core_sharing") == "layer_embedding":
        used["core_sharing"] = "layer_embedding"
    if given.get("core_type") in _REMOVED_CORE_TYPES and given["core_type"] not in registered_cores():
        used["core_type"] = given["core_type"]
    if used:
        listed = ", ".join(f"{name} {value!r}" for name, value in used.items())
        raise ValueError(
            f"{origin} has {listed}, an option that this version no longer has: make such a core yourself, by "
            "nara_diffusion.register_core (docs/cores.md), and train the adapter with that core_type."
        )
    return {name: value for name, value in given.items() if name not in REMOVED_FIELDS}


def is_naras(given: Mapping[str, Any], origin: str) -> bool:
    """Whether PEFT's file describes a NaRA.

    Raises:
        ValueError: it has the fields of a NaRA but another type, so that PEFT would ignore the core.
    """
    kind = given.get("peft_type")
    if kind != NaraPeftType.NARA.value and given.keys() >= _NARAS_OWN:
        raise ValueError(
            f"{origin} has the fields of a NaRA, but its peft_type is {kind!r}: damaged, it should be "
            f"'{NaraPeftType.NARA.value}'."
        )
    return kind == NaraPeftType.NARA.value


def config_to_fields(config: NaraConfig) -> dict[str, Any]:
    """The fields of a configuration as JSON values, without those of one machine."""
    return {
        key: _plain(value)
        for key, value in config.to_dict().items()
        if key not in _OF_ONE_MACHINE and value is not None
    }


def config_from_fields(given: Mapping[str, Any], origin: str) -> NaraConfig:
    """A configuration from `config_to_fields`, or from the adapter_config.json that PEFT writes.

    Raises:
        ValueError: it sets an unknown field, or NaraConfig refuses a value.
    """
    given = without_removed_fields(given, origin)
    unknown = sorted(key for key, value in given.items() if key not in _KNOWN | _OF_ONE_MACHINE and value)
    if unknown:
        raise ValueError(
            f"{origin} sets {', '.join(unknown)}, which this version of nara-diffusion and PEFT does not know: update "
            "them, or save the adapter again with these."
        )
    if not given.get("target_modules") and not given.get("target_parameters"):
        raise ValueError(
            f"{origin} has target_modules {given.get('target_modules')!r}: a saved adapter names the modules that it "
            "adapts, so it is damaged."
        )
    return _made_of({key: value for key, value in given.items() if key in _KNOWN}, origin)


def _made_of(given: dict[str, Any], origin: str) -> NaraConfig:
    missing = [name for name in _ALWAYS_WRITTEN if name not in given]
    if missing:
        raise ValueError(f"{origin} lacks {', '.join(missing)}, which every NaRA's file has: damaged.")
    try:
        check_fields(given)
        return NaraConfig(**{key: value for key, value in given.items() if key not in _OF_ONE_MACHINE})
    except (TypeError, ValueError, AttributeError, ImportError) as error:  # the latter two of PEFT's own checks
        raise ValueError(f"The configuration of {origin} is refused: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
