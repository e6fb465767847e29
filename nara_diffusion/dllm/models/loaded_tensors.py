"""Check that the tensors of a checkpoint fit the model: what transformers only logs is an error here.

A checkpoint may have heads that a masked language model lacks. Those of BERT's and ALBERT's pre-training are known
and left out, others are on demand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from .llada_conversion import checkpoint_name

# Heads that encoders are pre-trained with besides the one for masked tokens.
_OTHER_HEADS = re.compile(r"(^|\.)(pooler|seq_relationship|sop_classifier)\.")


def check_loaded_tensors(
    name: str, model: PreTrainedModel, loading: dict[str, Any], *, renamed: bool, ignored: Sequence[str]
) -> None:
    """Refuse a checkpoint whose tensors don't fit the model.

    Args:
        name: the name of the checkpoint.
        loading: the information of `from_pretrained(output_loading_info=True)`.
        renamed: whether tensors were renamed while they were loaded, as LLaDA's are.
        ignored: names of tensors, or of modules with all that is in them, that the model may lack.

    Raises:
        ValueError: tensors that are missing, not known to the model, or misshapen; an `ignored` name that none of the
            unknown ones has.
    """
    original = checkpoint_name if renamed else str
    surplus = sorted(original(key) for key in loading["unexpected_keys"] if not _OTHER_HEADS.search(key))
    for entry in ignored:
        if not any(_is_within(key, entry) for key in surplus):
            raise ValueError(
                f"ignore_tensors names {entry!r}, and it is none of those tensors of {name} that the model doesn't "
                f"have: {_listing(surplus) or 'there are none'}"
            )
    unknown = [key for key in surplus if not any(_is_within(key, entry) for entry in ignored)]
    problems = {
        "missing": sorted(original(key) for key in loading["missing_keys"]),
        "not known to the model": unknown,
        "of another shape": [
            f"{original(key)} {tuple(found)} instead of {tuple(expected)}"
            for key, found, expected in sorted(loading["mismatched_keys"])
        ],
    }
    found = [f"{len(keys)} {kind}: {_listing(keys)}" for kind, keys in problems.items() if keys]
    if found:
        remedy = "" if renamed or len(found) > 1 else _remedy(model, unknown)
        raise ValueError(f"the tensors of {name} don't fit its configuration; {'; '.join(found)}{remedy}")


def _remedy(model: PreTrainedModel, unknown: Sequence[str]) -> str:
    """The hint how to ignore the unknown tensors, if all of them belong to heads outside of the model's body."""
    if not unknown or any(_is_within(key, model.base_model_prefix) for key in unknown):
        return ""
    heads = sorted({_unknown_part(model, key) for key in unknown})
    return (
        ". If they belong to heads that masked language modelling doesn't use, leave them out: load_backbone(…, "
        f"ignore_tensors={heads}), or --ignore_tensors {' '.join(heads)} of train_scripts/dllm.py"
    )


def _unknown_part(model: PreTrainedModel, key: str) -> str:
    """The beginning of a tensor's name, up to the first part that the model lacks."""
    known = {name for name, _ in model.named_modules()}
    parts = key.split(".")
    starts = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return next((start for start in starts if start not in known), key)


def _is_within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _listing(keys: Sequence[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (", …" if len(keys) > limit else "")
