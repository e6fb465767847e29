"""Errors of memory, with the arguments that lower a run's need of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

Arguments = TypeVar("Arguments")
Result = TypeVar("Result")

# argument: (is it already as small as it gets?, what to say), most effective first
_REMEDIES = (
    ("mixed_precision", lambda value: value in ("bf16", "fp16"), "--mixed_precision bf16"),
    ("gradient_checkpointing", bool, "--gradient_checkpointing"),
    ("cache_latents", bool, "--cache_latents"),
    ("train_batch_size", lambda value: value <= 1, "--train_batch_size 1 with more --gradient_accumulation_steps"),
    ("use_8bit_adam", bool, "--use_8bit_adam"),
    ("train_text_encoder", lambda value: not value, "--no-train_text_encoder"),
    ("sample_batch_size", lambda value: value <= 1, "--sample_batch_size 1"),
    ("resolution", lambda value: value <= 512, "a lower --resolution"),
    ("max_length", lambda value: value <= 256, "a lower --max_length"),
    ("rank", lambda value: value <= 4, "a lower --rank"),
)


class OutOfMemory(RuntimeError):
    """A run needs more memory than there is; the message says what to turn on."""


@contextmanager
def explain_out_of_memory(args: Any, doing: str = "training") -> Iterator[None]:
    """Inside, raise `OutOfMemory` in place of torch's errors; it names the arguments of `args` that would help.

    Args:
        args: the arguments of a script. Only those that it has, and that can still be changed, are named.
        doing: what was running, for the message.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = remedies(args)
        listed = "; ".join(advice) if advice else "a smaller model, or a larger device"
        raise OutOfMemory(
            f"out of memory while {doing} ({first_line(error)}). Try, in this order: {listed}."
        ) from error


def explaining_out_of_memory(main: Callable[[Arguments], Result]) -> Callable[[Arguments], Result]:
    """Wrap a script's `main(args)` in `explain_out_of_memory`."""

    @wraps(main)
    def explained(args: Arguments) -> Result:
        with explain_out_of_memory(args):
            return main(args)

    return explained


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an out-of-memory error of torch or Python, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        mark in text for mark in ("out of memory", "can't allocate memory", "alloc_failed")
    )


def remedies(args: Any) -> list[str]:
    """The arguments that would lower a run's memory and aren't set yet, the most effective first."""
    return [
        text
        for name, done, text in _REMEDIES
        if hasattr(args, name) and not done(getattr(args, name)) and not _impossible(name, args)
    ]


def _impossible(name: str, args: Any) -> bool:
    """Whether the other arguments forbid this one."""
    return name == "use_8bit_adam" and getattr(args, "optimizer", "AdamW") != "AdamW"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
