"""Check lengths of texts against the positions that a model has."""

from __future__ import annotations

from torch import nn

from .models.backbone import Backbone

_MAX_LENGTH = 512


def check_positions(model: nn.Module, length: int, what: str, remedy: str) -> None:
    """Raise ValueError if `length` tokens exceed the model's positions: `what`, …: `remedy`."""
    limit = Backbone(model).position_limit
    if limit is not None and length > limit:
        raise ValueError(f"{what}, but the model has {limit} positions: {remedy}")


def check_canvas(model: nn.Module, longest_prompt: int, gen_length: int, record: str = "") -> None:
    """Raise ValueError if a canvas exceeds the model's positions.

    Args:
        record: the name of the record with the longest prompt, for messages.
    """
    length = longest_prompt + gen_length
    left = (Backbone(model).position_limit or 0) - gen_length
    remedy = "lower gen_length, or take shorter prompts and conversations"
    if record and left > 0:
        remedy += f" (the longest is {record}); --max_prompt_length {left} leaves longer ones out"
    lengths = f"the longest prompt has {longest_prompt} tokens and gen_length is {gen_length}"
    check_positions(model, length, f"{lengths}, together {length}", remedy)


def checked_lengths(model: nn.Module, max_length: int | None, gen_length: int) -> int:
    """Return the `max_length` of a training run.

    The default is 512, or the number of the model's positions if there are fewer.

    Raises:
        ValueError: `max_length` or `gen_length` exceeds the model's positions.
    """
    check_positions(
        model,
        gen_length + 1,
        f"gen_length is {gen_length}",
        "lower it, since prompt and answer share them",
    )
    if max_length is None:
        return min(_MAX_LENGTH, Backbone(model).position_limit or _MAX_LENGTH)
    check_positions(
        model, max_length, f"max_length is {max_length}", "lower it; longer answers are cut"
    )
    return max_length
