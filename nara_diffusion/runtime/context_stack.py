"""The stack of entered `with` blocks: λ, the adapter of each sample, ablations.

Entries live in a `ContextVar`, so that threads and async tasks do not see each other's. A `ContextVar` leaves two cases
open: a copy of it may outlive an entry, and generators that take turns share it. So each entry records whether it is
closed, and an entry made inside a running generator is active only while that generator runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, Generic, TypeVar

import torch

from nara_diffusion.utils.call_stack import Generator, enclosing_generator, is_suspended, running_calls

from .channel import CoreChannel, backward_pass, contexts

T = TypeVar("T")


def is_traced() -> bool:
    """Whether `torch.jit.trace` or `torch.export` traces the current code; neither of them sees a context."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[reportPrivateImportUsage]


@dataclass(eq=False)
class Entry(Generic[T]):
    """One entered `with` block: its value, and the channels of the models that it applies to.

    Attributes:
        generator: the innermost generator that ran when the block was entered.
        backward: the backward pass that ran then; see `channel.backward_pass`.
        in_trace: whether the `with` itself was traced.
        is_warned_of: whether the user was warned that a trace keeps its value as a constant.
    """

    channels: frozenset[CoreChannel]
    value: T
    generator: Generator | None = field(default_factory=enclosing_generator)
    backward: int | None = field(default_factory=backward_pass)
    in_trace: bool = field(default_factory=is_traced)
    is_open: bool = True
    is_warned_of: bool = False


@torch.compiler.disable(recursive=True)
def _entry(channels: frozenset[CoreChannel], value: Any) -> Entry[Any]:
    """Not compiled: no compiler can trace code that inspects stack frames."""
    return Entry(channels, value)


class entered(ContextDecorator):
    """Inside, `innermost` finds `value` for `channels`, by its type."""

    def __init__(self, channels: frozenset[CoreChannel], value: Any) -> None:
        self._channels, self._value = channels, value
        self._context = _entered(channels, value)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)

    def _recreate_cm(self) -> entered:
        return entered(self._channels, self._value)

    def __call__(self, function: Any) -> Any:
        """Decorates a function, each of whose calls then runs inside."""
        if isgeneratorfunction(function) or iscoroutinefunction(function) or isasyncgenfunction(function):
            raise TypeError(
                f"A context of λ can't decorate '{function.__name__}': the body of a generator or coroutine function "
                "runs after the decorated call returns. Enter the context by `with` in the body."
            )
        return super().__call__(function)


@contextmanager
def _entered(channels: frozenset[CoreChannel], value: Any) -> Iterator[None]:
    entry = _entry(channels, value)
    contexts.set((*contexts.get(), entry))
    try:
        with ExitStack() as asking:
            for channel in channels:
                asking.enter_context(channel.asking())
            yield
    finally:
        # not `ContextVar.reset`: generators may leave their contexts in any order, and in other threads and tasks
        entry.is_open = False
        entry.generator = None  # copies of the `ContextVar` may outlive it, and would keep alive what it holds
        contexts.set(tuple(other for other in contexts.get() if other.is_open))


def innermost(channel: CoreChannel, kind: type[T]) -> Entry[T] | None:
    """The innermost active entry for the model of `channel` whose value is a `kind`.

    An entry of a generator lies inside all entries of the generator's callers, also of those made while it was
    suspended.

    Raises:
        ValueError: it is unclear whether an entry is active: its generator has ended, awaits, runs in another thread,
        or
            may implement a context manager.
    """
    entries = [e for e in contexts.get() if e.is_open and channel in e.channels and isinstance(e.value, kind)]
    if all(entry.generator is None for entry in entries):
        return entries[-1] if entries else None
    depths = {call: float(depth) for depth, call in enumerate(running_calls())}

    def depth(entry: Entry[T]) -> float | None:
        return math.inf if entry.generator is None else depths.get(entry.generator.call)

    for entry in entries:
        if depth(entry) is None and (entry.generator.may_manage or not is_suspended(entry.generator.call)):  # type: ignore[union-attr]
            raise ValueError(
                f"λ is not known: '{entry.generator.call.f_code.co_name}', a generator that has entered a context of "  # type: ignore[union-attr]
                "this model (noise_level(…), or an ablation), has ended without leaving it, awaits, runs in another "
                "thread, or was advanced by an `__enter__`, so that it is unclear where the context applies. Enter the "
                "context by `with` in the function or generator that calls the model."
            )
    holding = [entry for entry in entries if depth(entry) is not None]
    return min(reversed(holding), key=depth, default=None)  # type: ignore[arg-type]
