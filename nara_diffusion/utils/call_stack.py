"""The Python calls that this thread is inside of. No other module looks at frames."""

from __future__ import annotations

import asyncio
import contextlib
import dis
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def running_calls() -> Iterator[FrameType]:
    """The caller's own call first, the outermost last."""
    call = sys._getframe(1)
    while call is not None:
        yield call
        call = call.f_back


def is_running(call: FrameType) -> bool:
    """Whether this thread is inside of `call`."""
    return any(running is call for running in running_calls())


def local_variables() -> Iterator[Mapping[str, Any]]:
    """The local variables of each running call, by name, the innermost call first."""
    for call in running_calls():
        yield call.f_locals


class Generator(NamedTuple):
    """A generator's call. `may_manage`: whether the body of somebody's `with` may be what it yields to."""

    call: FrameType
    may_manage: bool


def enclosing_generator() -> Generator | None:
    """The innermost generator that the caller runs inside of, if any: what it enters now may be suspended with it.

    A generator that makes a context manager by `contextlib` is none, since it yields to the body of a `with`; nor is a
    coroutine of an event loop, whose tasks have context variables of their own.
    """
    for call in running_calls():  # by no generator expression, which would be found itself
        if _may_be_suspended(call):
            advances = _enter_that_advances(call)
            if advances is None or advances.f_code.co_filename != contextlib.__file__:
                return Generator(call, may_manage=advances is not None)
    return None


def _may_be_suspended(call: FrameType) -> bool:
    flags = call.f_code.co_flags
    return bool(flags & _GENERATOR) or (bool(flags & inspect.CO_COROUTINE) and not _is_in_event_loop())


def _is_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _enter_that_advances(generator: FrameType) -> FrameType | None:
    """The `__enter__` that advances it, or the generator that does `yield from` it, if there is one."""
    caller = generator.f_back
    while caller is not None and caller.f_code.co_name not in ("__enter__", "__aenter__"):
        caller = caller.f_back if _instructions(caller)[-1] in ("SEND", "YIELD_FROM") else None
    return caller


def is_suspended(generator: FrameType) -> bool:
    """Whether a generator that has begun rests at a `yield`, and neither has ended nor runs, in whatever thread.

    An asynchronous one that awaits does not rest: what runs meanwhile may be a task that it has started.
    """
    is_async = bool(generator.f_code.co_flags & inspect.CO_ASYNC_GENERATOR)
    if sys.version_info < (3, 11) and _instructions(generator, ahead=2)[-1] == "YIELD_FROM":  # it stands before that
        return not is_async
    names = _instructions(generator)
    if names[-1] == "RESUME":  # 3.13 stands behind the instruction that yields
        names.pop()
    return names[-1] == "YIELD_VALUE" and not (is_async and names[-2] == "SEND")


def _instructions(call: FrameType, ahead: int = 0) -> list[str]:
    """The names of the bytecode instructions up to that at which `call` stands, or up to `ahead` bytes further on."""
    names = [dis.opname[code] for code in call.f_code.co_code[: call.f_lasti + ahead + 1 : 2]]
    return [name for name in names if name != "CACHE"]  # which belongs to the instruction before
