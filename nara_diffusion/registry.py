"""Every registration with PEFT, in one place; run on import, harmless when run again."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import NaraConfig, NaraPeftType
from .model import NaraModel


def register() -> None:
    """Make NaRA a method that PEFT knows. (`peft.utils.register_peft_method` takes names of PEFT's own enum only.)"""
    PEFT_TYPE_TO_CONFIG_MAPPING[NaraPeftType.NARA] = NaraConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[NaraPeftType.NARA] = NaraModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[NaraPeftType.NARA] = NaraModel.prefix  # type: ignore[index]
