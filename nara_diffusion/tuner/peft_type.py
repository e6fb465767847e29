"""NaRA's name among the types of PEFT's methods."""

from __future__ import annotations

from enum import Enum


class NaraPeftType(str, Enum):
    """NaRA's entry among PEFT's types. PEFT prints it in its error about mixed types, so `str` gives the remedy."""

    NARA = "NARA"

    def __str__(self) -> str:
        return (
            "NARA (in one PeftModel all adapters have one type: a plain LoRA joins NaRA ones as "
            'NaraConfig(core_type="identity"))'
        )

    __format__ = object.__format__
