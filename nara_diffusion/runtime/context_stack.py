"""The one stack of what `with` blocks say of forwards: λ, the adapter of each sample, ablations.

Entries live in a `ContextVar`, so that neither threads nor async tasks see each other's. Two things remain that it
does not separate: a copy of a `ContextVar` may outlive an entry, and generators that take turns share one. So an
entry knows itself whether it is over, and one that was made inside a running generator, by a `with` there or by
whatever else it called, holds only while that generator runs.
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
    """Whether `torch.jit.trace` or `torch.export`, neither of which sees a context, runs what runs here."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[reportPrivateImportUsage]


@dataclass(eq=False)
class Entry(Generic[T]):
    """What one `with` block says, for which models.

    Attributes:
        generator: the innermost running generator that it was made inside of.
        backward: the backward pass that was running; see `channel.backward_pass`.
        in_trace: whether the `with` itself was traced.
        is_warned_of: whether a user has been told what a trace makes of it.
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
    """No compiler can trace a look at frames."""
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
                f"A context of λ can't decorate '{function.__name__}', a generator or coroutine function, whose body "
                "runs after the call that it would hold for: enter it by `with` in the body."
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
        # not `ContextVar.reset`: what generators have entered may end in any order, and in other threads and tasks
        entry.is_open = False
        entry.generator = None  # copies of the `ContextVar` may outlive it, and would keep alive what it holds
        contexts.set(tuple(other for other in contexts.get() if other.is_open))


def innermost(channel: CoreChannel, kind: type[T]) -> Entry[T] | None:
    """The entry that holds for the model of `channel` here and now, of those whose value is a `kind`.

    What a generator has entered lies inside of all that its callers enter, also while it was suspended.

    Raises:
        ValueError: for whom an entry holds can't be told: it was made inside a generator that has ended since, awaits,
            or runs in another thread, or that may have made a context manager.
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
                "thread, or was advanced by an `__enter__`, so that nobody can tell for whom the context holds. Enter "
                "it by `with` in the function, or in the generator, that calls the model."
            )
    holding = [entry for entry in entries if depth(entry) is not None]
    return min(reversed(holding), key=depth, default=None)  # type: ignore[arg-type]
