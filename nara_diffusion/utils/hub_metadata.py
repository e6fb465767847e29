"""The front matter of a model card, by which the Hub files an adapter under its base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

ADAPTER, FINETUNE = "adapter", "finetune"
"""What the Hub calls the relation to a base model: of an adapter, and of a whole model."""


def front_matter(library: str, tags: Sequence[str], base_model: str | None, relation: str, **others: Any) -> str:
    """The YAML between the card's two lines of dashes.

    Args:
        library: the library that loads it.
        base_model: an id of the Hub; a path of this disk is left out, and its relation with it.
        relation: `ADAPTER` or `FINETUNE`.
        others: further keys, such as `instance_prompt` and `widget`; those that are None are left out.
    """
    known = {name: value for name, value in others.items() if value is not None}
    if base_model is not None and not Path(base_model).exists():
        known |= {"base_model": base_model, "base_model_relation": relation}
    return ModelCardData(library_name=library, tags=list(tags), **known).to_yaml()
