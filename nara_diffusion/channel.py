"""How C(λ) travels from the root of an adapted model to its layers, in forward, recomputation and compiled graphs.

What layers may read is kept for the thread that runs the root's forward, and only while it does: a layer that finds
nothing raises, so that C can be missing, but never stale or somebody else's. (A forward does not yield to another
async task, so a thread is separation enough; unlike a `ContextVar`, a thread-local can be read inside a compiled
graph.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Frame = Mapping[tuple[str, str], Tensor]
"""(adapter name, group name) → C (b or 1, r, r)."""


def backward_pass() -> int | None:
    """The number of the backward pass that runs in this thread: −1 for none, None where a compiler is tracing."""
    return None if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class Scope(NamedTuple):
    """What layers may read, until when.

    Attributes:
        frame: the cores. backward: `backward_pass()` when it began.
        call: the Python call that has to be running still, or None if a `finally` ends the scope.
    """

    frame: Frame
    backward: int | None
    call: FrameType | None

    def is_over(self) -> bool:
        """Whether the forward was cut short by what runs no hook, such as a KeyboardInterrupt."""
        return self.call is not None and not _is_running(self.call)


class CoreChannel:
    """Hands C(λ) from the root of one adapted model to its layers, for the thread and time of one forward.

    Args:
        sample_major: whether a layer may see b · k rows, k consecutive ones a sample, where the root sees b.
    """

    def __init__(self, sample_major: bool = False) -> None:
        self.sample_major = sample_major
        self.local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return CoreChannel, (self.sample_major,)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Of this thread, the innermost last: a forward may run inside another one of the same model."""
        return getattr(self.local, "scopes", ())

    @property
    def frame(self) -> Frame | None:
        """What layers may read here and now.

        Nothing in a backward pass that began after the forward: it recomputes a part of some other forward.
        """
        scopes = self.scopes
        if torch.compiler.is_compiling():
            # a compiled layer cannot look for that: do not run a backward pass through a checkpoint of your own around
            # a block that is compiled by itself, while another forward of the model runs
            return scopes[-1].frame if scopes else None
        for scope in reversed(scopes):
            if not scope.is_over():
                return scope.frame if scope.backward in (None, backward_pass()) else None
        return None

    def begin(self, frame: Frame) -> None:
        """To be called by a forward pre-hook of the root: layers read `frame` until its forward ends."""
        self.drop_what_is_over()
        self.local.scopes = (*self.scopes, Scope(frame, backward_pass(), _root_call()))

    def end(self) -> None:
        """To be called by a forward hook of the root: ends what `begin` began in the same call, if it did."""
        call = _root_call()
        calls = [scope.call for scope in self.scopes]
        if call in calls:
            self.local.scopes = self.scopes[: calls.index(call)]

    def drop_what_is_over(self) -> None:
        """Forget forwards of this thread that were cut short; a compiled layer does not look whether they run still."""
        self.local.scopes = tuple(scope for scope in self.scopes if not scope.is_over())

    @contextmanager
    def using(self, frame: Frame) -> Iterator[None]:
        """Layers read `frame` inside; what they read before comes back afterwards."""
        outer = self.scopes
        self.local.scopes = (*outer, Scope(frame, backward_pass(), None))
        try:
            yield
        finally:
            self.local.scopes = outer


def _root_call() -> FrameType:
    """The call of the root, as seen from one of its hooks: the innermost running `nn.Module.__call__`."""
    frame = sys._getframe(1)
    while frame.f_code is not nn.Module._call_impl.__code__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_running(call: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is call
