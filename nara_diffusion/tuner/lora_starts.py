"""`init_lora_weights`: which of PEFT's initialisations a NaRA supports, and which of them change the base weights."""

from __future__ import annotations

import re
from typing import Any

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BALANCED = ("pissa", "olora", "orthogonal")  # the adapted model starts as the base only with C = I
_SUPPORTED = ("gaussian", *_BALANCED)
_REFUSED = {
    "loftq": "LoftQ fits A and B to a quantisation error without C, on a GPU alone",
    "eva": "EVA redistributes ranks after the core has been made",
    "mica": "MiCA is another LoRA variant of the same layer",
    "corda": "CorDA takes statistics of the base model from an earlier pass at no λ",
    "lora_ga": "LoRA-GA takes gradients of the base model from an earlier pass at no λ",
}


def changes_base(start: Any) -> bool:
    """Whether the initialisation replaces the base weights: by W − s·B·A, or by LoftQ's quantised ones."""
    return str(start).lower().startswith(_BASE_CHANGING)


def _needs_identity(start: Any) -> bool:
    return str(start).lower().startswith(_BALANCED)


def check_start(start: Any, core_type: str, core_init: str) -> None:
    """Raises ValueError if the initialisation is unknown, or not possible with this type and start of the core."""
    if isinstance(start, bool):
        return
    kind = re.sub(r"^pissa_niter_\d+$", "pissa", start) if isinstance(start, str) else ""
    is_refused = kind.lower() in _REFUSED
    choices = f"True, False or one of {', '.join(map(repr, _SUPPORTED))}"
    if kind not in _SUPPORTED and not is_refused:
        raise ValueError(f"init_lora_weights is {start!r}, which NaRA does not know: use {choices}.")
    if core_type == "identity":
        return
    if is_refused:
        raise ValueError(f"NaRA does not support init_lora_weights={start!r}: {_REFUSED[kind.lower()]}. Use {choices}.")
    if _needs_identity(start) and core_type not in ("hypernetwork", "constant", "knots"):
        raise ValueError(
            f"init_lora_weights={start!r} needs C = I at step 0, which core_type={core_type!r} does not "
            "promise: use init_lora_weights=True."
        )
    if _needs_identity(start) and core_init == "kaiming":
        raise ValueError(
            f"init_lora_weights={start!r} needs C = I at step 0, but core_init is 'kaiming': use core_init='zero_last'."
        )
