"""The Python calls that this thread is inside of. No other module looks at frames."""

from __future__ import annotations

import asyncio
import dis
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import FrameType, FunctionType
from typing import Any

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


def innermost_call_of(function: FunctionType) -> FrameType:
    """The innermost running call of `function`; where there is none, the outermost call of all."""
    for call in running_calls():
        if call.f_code is function.__code__:
            break
    return call


def local_variables() -> Iterator[Mapping[str, Any]]:
    """Those of each running call, by name, the innermost call first."""
    for call in running_calls():
        yield call.f_locals


def enclosing_generator() -> FrameType | None:
    """The innermost generator that the caller runs inside of, if any: what it enters now may be suspended with it.

    A generator that makes a context manager is none, since it yields to the body of somebody's `with`; nor is a
    coroutine of an event loop, whose tasks have context variables of their own.
    """
    for call in running_calls():  # by no generator expression, which would be found itself
        if _may_be_suspended(call) and not _manages_a_context(call):
            return call
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


def _manages_a_context(generator: FrameType) -> bool:
    """Whether an `__enter__` advances it, or the generator that does `yield from` it."""
    caller = generator.f_back
    while caller is not None and caller.f_code.co_name not in ("__enter__", "__aenter__"):
        caller = caller.f_back if _instruction(caller) in ("SEND", "YIELD_FROM") else None
    return caller is not None


def is_suspended(generator: FrameType) -> bool:
    """Whether a generator that has begun rests at a `yield`, and neither has ended nor runs, in whatever thread."""
    if sys.version_info < (3, 11) and _instruction(generator, ahead=2) == "YIELD_FROM":  # it stands before that
        return True
    return _instruction(generator) in ("YIELD_VALUE", "RESUME")  # 3.13 stands behind the one, at the other


def _instruction(call: FrameType, ahead: int = 0) -> str:
    """The name of the bytecode instruction at which `call` stands, or of that `ahead` bytes further on."""
    names = [dis.opname[code] for code in call.f_code.co_code[: call.f_lasti + ahead + 1 : 2]]
    return next(name for name in reversed(names) if name != "CACHE")  # which belongs to the instruction before
