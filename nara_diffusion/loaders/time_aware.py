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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import tc_lora, tlora_repository
from .adapter_part import AdapterPart
from .lycoris import convert_lycoris
from .tensor_files import OTHER_WEIGHTS_NAMES, PEFT_CONFIG_NAME, read_tensors
from .tlora import OtherFile
from .tlora_repository import convert_repository


@dataclass(frozen=True)
class TimeAwareFormat:
    """A format of another project.

    Attributes:
        name: the name in messages.
        key: the pattern of keys that only this format has.
        convert: a function that returns the adapter's part.
    """

    name: str
    key: re.Pattern[str]
    convert: Callable[[OtherFile], AdapterPart]


FORMATS = (
    TimeAwareFormat(
        "a T-LoRA of LyCORIS; its start factors come from the base's weights",
        re.compile(r"[^.]+\.(lambda_layer|[pq]_layer\.weight)"),
        convert_lycoris,
    ),
    TimeAwareFormat("a T-LoRA of its authors' code", tlora_repository.KEY, convert_repository),
    TimeAwareFormat("a Tc-LoRA", tc_lora.KEY, tc_lora.convert_tc_lora),
)


def format_of(keys: Iterable[str]) -> TimeAwareFormat | None:
    """Return the format that one of the `keys` belongs to, or None."""
    keys = list(keys)
    return next((kind for kind in FORMATS if any(map(kind.key.fullmatch, keys))), None)


def check_readable_by_peft(source: str | Path) -> None:
    """Raise ValueError if PEFT is about to load a local file of one of these formats."""
    path = Path(source)
    files = [path] if path.is_file() else [path / name for name in OTHER_WEIGHTS_NAMES]
    for file in [] if (path / PEFT_CONFIG_NAME).is_file() else filter(Path.is_file, files):
        if other := format_of(read_tensors(file)[0]):
            raise ValueError(
                f"'{file}' is {other.name}, without an {PEFT_CONFIG_NAME}. Load it with pipe.load_nara_weights, or "
                "write a folder for PEFT with nara convert --to peft."
            )
