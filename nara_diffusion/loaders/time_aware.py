"""Recognise adapters of other projects that depend on the noise level, by the keys of their tensors.

| format               | a key that only it has                         | written by                 |
|----------------------|------------------------------------------------|----------------------------|
| T-LoRA of LyCORIS    | lycoris_….lambda_layer, one dot                | LyCORIS ≥ 4, SimpleTuner   |
| T-LoRA, its own code | ….attn1.processor.to_q_lora.…, no "unet." ahead | ControlGenAI/T-LoRA        |
| Tc-LoRA              | ….lora_time_gamma.weight                       | DiffSynth-Studio           |

Each format has a file with its formula and a function that makes an ordinary `AdapterPart` of it,
so that everything else in this package treats the adapter as its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from . import tc_lora, tlora

LYCORIS = "a T-LoRA of LyCORIS"
REPOSITORY = "a T-LoRA of its authors' code"
TC_LORA = "a Tc-LoRA"
_KEYS = {
    LYCORIS: re.compile(r"[^.]+\.(lambda_layer|[pq]_layer\.weight)"),
    REPOSITORY: tlora.REPOSITORY_KEY,
    TC_LORA: tc_lora.KEY,
}
"""{name of a format: the pattern of keys that only this format has}."""


def format_of(keys: Iterable[str]) -> str | None:
    """Return the name of the format that one of the `keys` belongs to, or None."""
    keys = list(keys)
    return next((name for name, key in _KEYS.items() if any(map(key.fullmatch, keys))), None)
