"""The one stack of what `with` blocks say of forwards: λ, the adapter of each sample, ablations.

Entries live in a `ContextVar`, so that neither threads nor async tasks see each other's. Two things remain that it
does not separate: a copy of a `ContextVar` may outlive an entry, and generators that take turns share one. So an
entry knows itself whether it is over, and one that was made inside a running generator, by a `with` there or by
whatever else it called, holds only while that generator runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, TypeVar

import torch

from .call_stack import enclosing_generator, is_suspended, running_calls
from .channel import CoreChannel, backward_pass

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
    generator: FrameType | None = field(default_factory=enclosing_generator)
    backward: int | None = field(default_factory=backward_pass)
    in_trace: bool = field(default_factory=is_traced)
    is_open: bool = True
    is_warned_of: bool = False


_stack: ContextVar[tuple[Entry[Any], ...]] = ContextVar("nara_contexts", default=())


@torch.compiler.disable(recursive=True)
def _entry(channels: frozenset[CoreChannel], value: Any) -> Entry[Any]:
    """No compiler can trace a look at frames."""
    return Entry(channels, value)


@contextmanager
def entered(channels: frozenset[CoreChannel], value: Any) -> Iterator[None]:
    """Inside, `innermost` finds `value` for `channels`, by its type."""
    entry = _entry(channels, value)
    _stack.set((*_stack.get(), entry))
    try:
        yield
    finally:
        # not `ContextVar.reset`: what generators have entered may end in any order, and in other threads and tasks
        entry.is_open = False
        entry.generator = None  # copies of the `ContextVar` may outlive it, and would keep alive what it holds
        _stack.set(tuple(other for other in _stack.get() if other.is_open))
        for channel in channels:
            channel.drop_what_is_over()


def innermost(channel: CoreChannel, kind: type[T]) -> Entry[T] | None:
    """The entry that holds for the model of `channel` here and now, of those whose value is a `kind`.

    What a generator has entered lies inside of all that its callers enter, also while it was suspended.

    Raises:
        ValueError: an entry was made inside a generator that has ended since, or that another thread runs.
    """
    entries = [e for e in _stack.get() if e.is_open and channel in e.channels and isinstance(e.value, kind)]
    if all(entry.generator is None for entry in entries):
        return entries[-1] if entries else None
    depths: dict[FrameType | None, float] = {call: depth for depth, call in enumerate(running_calls())}
    depths[None] = math.inf
    for entry in entries:
        if entry.generator not in depths and not is_suspended(entry.generator):  # type: ignore[arg-type]
            name = entry.generator.f_code.co_name  # type: ignore[union-attr]
            raise ValueError(
                f"λ is not known: '{name}', a generator that has entered a context of this model (noise_level(…), or "
                "an ablation), has ended without leaving it, or runs in another thread, so that nobody can tell for "
                "whom the context holds. Enter it by `with` in the function, or in the generator, that calls the model."
            )
    holding = [entry for entry in entries if entry.generator in depths]
    return min(reversed(holding), key=lambda entry: depths[entry.generator], default=None)
