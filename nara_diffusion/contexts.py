"""Which `with noise_level(…)` holds here and now.

Contexts live in a `ContextVar`, so that neither threads nor async tasks see each other's. Two things remain that it
does not separate: a copy of a `ContextVar` may outlive a context, and generators that take turns share one. So a
context knows itself whether it is over, and one that a generator has entered holds only while that generator runs.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from .channel import CoreChannel, backward_pass


@dataclass(eq=False)
class Context:
    """One `with` block: what it says, for which models.

    Attributes:
        call: the call that has entered it. suspends: whether that is a generator's, other than one that `contextlib`
            makes a context manager of, which yields to the body of its own `with`.
        backward: the backward pass that was running; see `channel.backward_pass`.
    """

    channels: frozenset[CoreChannel]
    signals: Any
    call: FrameType
    suspends: bool
    is_open: bool = True
    backward: int | None = field(default_factory=backward_pass)


_contexts: ContextVar[tuple[Context, ...]] = ContextVar("nara_noise_level", default=())


@contextlib.contextmanager
def entered(channels: frozenset[CoreChannel], signals: Any) -> Iterator[None]:
    """Inside, `innermost` finds `signals` for `channels`."""
    context = Context(channels, signals, *_entering_call())
    _contexts.set((*_contexts.get(), context))
    try:
        yield
    finally:
        # not `ContextVar.reset`: contexts that generators hold may end in any order, and in other threads and tasks
        context.is_open = False
        del context.call  # copies of the `ContextVar` may outlive it, and would keep alive what it holds
        _contexts.set(tuple(other for other in _contexts.get() if other.is_open))
        for channel in channels:
            channel.drop_what_is_over()


def innermost(channel: CoreChannel) -> Context | None:
    """The context that holds for the model of `channel`, for this caller."""
    contexts = [context for context in _contexts.get() if context.is_open and channel in context.channels]
    if not any(context.suspends for context in contexts):
        return contexts[-1] if contexts else None
    depths = {call: depth for depth, call in enumerate(_running_calls())}
    contexts = [context for context in contexts if not context.suspends or context.call in depths]
    if not contexts:
        return None
    chosen = contexts.pop()
    for context in reversed(contexts):
        # what a generator's caller enters while the generator is suspended lies around what the generator has entered
        if context.suspends and depths[context.call] < depths.get(chosen.call, -1):
            chosen = context
    return chosen


def _running_calls() -> Iterator[FrameType]:
    """The calls that this thread is inside of, the innermost first."""
    call: FrameType | None = sys._getframe(1)
    while call is not None:
        yield call
        call = call.f_back


def _entering_call() -> tuple[FrameType, bool]:
    """The call that enters a context, behind the machinery that does it, and whether it may be suspended inside."""
    machinery = (__file__, contextlib.__file__)
    call = next(call for call in _running_calls() if call.f_code.co_filename not in machinery)
    is_generator = bool(call.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR))
    is_manager = call.f_back is not None and call.f_back.f_code.co_filename == contextlib.__file__
    return call, is_generator and not is_manager
