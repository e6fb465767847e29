"""Numbers among the arguments that lm-eval passes to the model, as text or as numbers."""

from __future__ import annotations

from typing import Any


def fixed_batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    """The batch size as an int.

    Raises:
        ValueError: it is to be searched for ("auto", or up to a largest one).
    """
    if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
        given = f"--batch_size {batch_size}" + ("" if max_batch_size is None else f" --max_batch_size {max_batch_size}")
        raise ValueError(f"{given}: nara_dllm doesn't look for a batch size, name one, such as --batch_size 8")
    return int(batch_size)


def whole_number(name: str, value: Any, least: int) -> int:
    """`value`, which --model_args has as text or number, as an int.

    Raises:
        ValueError: it is no whole number of `least` or more; `name` is the argument's.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number < least or (isinstance(value, float) and value != number):
        raise ValueError(f"{name} is {value!r}, expected a whole number, {least} or more")
    return number
