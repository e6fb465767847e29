"""How C(λ) travels from the root of an adapted model to its layers, in forward, recomputation and compiled graphs.

What layers may read is kept for the thread that runs the root's forward, and only while it does. A layer that is called
outside of any forward of the root asks for C, which is made for it at once if λ is known; a layer that finds nothing
raises, so that C can be missing, but never stale or somebody else's. (A forward does not yield to another async task,
so a thread is separation enough; unlike a `ContextVar`, a thread-local can be read inside a compiled graph.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .call_stack import innermost_call_of, is_running

contexts: ContextVar[tuple[Any, ...]] = ContextVar("nara_contexts", default=())
"""What `with` blocks say of forwards; see contexts.py."""

Frame = Mapping[tuple[str, str], Tensor]
"""(adapter name, group name) → C (b or 1, r, r)."""


def backward_pass() -> int | None:
    """The number of the backward pass that runs in this thread: −1 for none, None where a compiler is tracing."""
    return None if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def is_current(backward: int | None) -> bool:
    """Whether what began in the backward pass of that number, or in none, may be read now: not by a later one."""
    now = backward_pass()
    return backward is None or now is None or backward == now


class Scope(NamedTuple):
    """What layers may read, until when.

    Attributes:
        frame: the cores. backward: `backward_pass()` when it began.
        call: the Python call that has to be running still, or None if a `finally` ends the scope.
        entered: the contexts that it began in.
    """

    frame: Frame
    backward: int | None
    call: FrameType | None
    entered: tuple[Any, ...]

    def is_over(self) -> bool:
        """Whether the forward was cut short by what runs no hook, such as a KeyboardInterrupt."""
        return self.call is not None and not is_running(self.call)


class CoreChannel:
    """Hands C(λ) from the root of one adapted model to its layers, for the thread and time of one forward.

    Args:
        ask: makes what a part of the model may read that is called by itself, or None where λ is not known.
        check_merged: refuses another λ than that of what is merged.
        sample_major: whether a layer may see b · k rows, k consecutive ones a sample, where the root sees b.
    """

    def __init__(
        self, ask: Callable[[], Frame | None], check_merged: Callable[[], None], sample_major: bool = False
    ) -> None:
        self.ask = ask
        self._check_merged = check_merged
        self.sample_major = sample_major
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"ask": self.ask, "_check_merged": self._check_merged, "sample_major": self.sample_major}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, local=threading.local())

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
            return scopes[-1].frame if scopes else self._ask_at_once()
        for scope in reversed(scopes):
            if not scope.is_over():
                if self._was_told_since(scope):
                    break  # a part is called inside a context of its own
                return scope.frame if is_current(scope.backward) else None
        return self.ask()

    def _was_told_since(self, scope: Scope) -> bool:
        entered = contexts.get()
        if entered is scope.entered:
            return False
        return any(entry.is_open and self in entry.channels and entry not in scope.entered for entry in entered)

    def check_merged(self) -> None:
        """Refuse another λ than that of what is merged; to be called by a merged layer, whose root may not run.

        (Not in a backward pass, which recomputes what has been checked, nor while a compiler is tracing.)
        """
        if backward_pass() == -1 and contexts.get():
            self._check_merged()

    @torch.compiler.disable(recursive=True)
    def _ask_at_once(self) -> Frame | None:
        frame = self.ask()
        return None if frame is None else dict(frame)

    def begin(self, frame: Frame) -> None:
        """To be called by a forward pre-hook of the root: layers read `frame` until its forward ends."""
        self.drop_what_is_over()
        self.local.scopes = (*self.scopes, Scope(frame, backward_pass(), _root_call(), contexts.get()))

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
        self.local.scopes = (*outer, Scope(frame, backward_pass(), None, contexts.get()))
        try:
            yield
        finally:
            self.local.scopes = outer


def _root_call() -> FrameType:
    """The call of the root, as seen from one of its hooks: the innermost running `nn.Module.__call__`."""
    return innermost_call_of(nn.Module._call_impl)
