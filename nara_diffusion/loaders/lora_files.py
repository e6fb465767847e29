"""Diffusers' readers of LoRA files refuse a NaRA's, of which they would leave out the core."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from safetensors import safe_open

from .file import METADATA_KEY
from .strict import is_core_key

_REFUSAL = (
    "holds a NaRA adapter, of which loading as a LoRA would leave out the core: load it by pipe.load_nara_weights(…)."
)


def fetch_without_cores(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Around Diffusers' `_fetch_state_dict`, of whatever was given.

    Raises:
        ValueError: it has tensors of a core.
    """
    fetched = original(*args, **kwargs)
    check_without_cores(fetched[0])
    return fetched


def load_lora_metadata(original: Any, model_file: str) -> Any:
    """Around Diffusers' `_load_sft_state_dict_metadata`.

    Raises:
        ValueError: the file is a NaRA's.
    """
    with safe_open(model_file, framework="pt", device="cpu") as file:
        if METADATA_KEY in (file.metadata() or {}):
            raise ValueError(f"'{model_file}' {_REFUSAL}")
    return original(model_file)


def check_without_cores(keys: Iterable[str]) -> None:
    """Raises ValueError if one of `keys` is a core's."""
    if any(is_core_key(key) for key in keys):
        raise ValueError(f"What was given {_REFUSAL}")
