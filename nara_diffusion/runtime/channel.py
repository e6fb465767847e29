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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nara_diffusion.utils.call_stack import is_running

contexts: ContextVar[tuple[Any, ...]] = ContextVar("nara_contexts", default=())
"""What `with` blocks say of forwards; see context_stack.py."""

PerForwardCores = Mapping[tuple[str, str], Tensor]
"""(adapter name, group name) → C (b or 1, r, r)."""


def backward_pass() -> int | None:
    """The number of the backward pass that runs in this thread: −1 for none, None where a compiler is tracing."""
    return None if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def is_current(backward: int | None) -> bool:
    """Whether what began in the backward pass of that number, or in none, may be read now: not by a later one."""
    now = backward_pass()
    return backward is None or now is None or backward == now


class Scope(NamedTuple):
    """What layers may read.

    Attributes:
        cores: the per-forward cores; None where a layer has to ask.
        backward: `backward_pass()` when it began.
        entered: the contexts that held where it began.
    """

    cores: PerForwardCores | None
    backward: int | None
    entered: tuple[Any, ...] = ()


def _holds(entry: Any) -> bool:
    """Whether the generator that has entered it, if one has, runs."""
    return entry.generator is None or is_running(entry.generator.call)


def _holding() -> tuple[Any, ...]:
    entered = contexts.get()
    if torch.compiler.is_compiling():  # which cannot trace a look at calls, and whose layers don't ask for that
        return entered
    return tuple(entry for entry in entered if _holds(entry))


class CoreChannel:
    """Hands C(λ) from the root of one adapted model to its layers, for the thread and time of one forward.

    Args:
        ask: makes what a part of the model may read that is called by itself, or None where λ is not known.
        check_merged: refuses another λ than that of what is merged.
        sample_major: whether a layer may see b · k rows, k consecutive ones a sample, where the root sees b.
        one_level: whether layers see something else than samples first, so that a batch must share its λ.
    """

    def __init__(
        self,
        ask: Callable[[], PerForwardCores | None],
        check_merged: Callable[[], None],
        sample_major: bool = False,
        one_level: bool = False,
    ) -> None:
        self.ask = ask
        self._check_merged = check_merged
        self.sample_major = sample_major
        self.one_level = one_level
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, local=threading.local())

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Of this thread, the innermost last: a forward may run inside another one of the same model."""
        return getattr(self.local, "scopes", ())

    @property
    def cores(self) -> PerForwardCores | None:
        """What layers may read here and now.

        Nothing in a backward pass that began after the forward: it recomputes a part of some other forward.
        """
        scope = self.scopes[-1] if self.scopes else Scope(None, None)
        if torch.compiler.is_compiling():
            # a compiled layer cannot look for that: do not run a backward pass through a checkpoint of your own around
            # a block that is compiled by itself, while another forward of the model runs
            return self._ask_at_once() if scope.cores is None else scope.cores
        if scope.cores is None or self._is_told_otherwise(scope):
            return self.ask()
        return scope.cores if is_current(scope.backward) else None

    def _is_told_otherwise(self, scope: Scope) -> bool:
        """Whether a part runs in a context that did not hold where `scope` began."""
        own = (entry for entry in contexts.get() if entry.is_open and self in entry.channels)
        return any(entry not in scope.entered and _holds(entry) for entry in own)

    def check_merged(self) -> None:
        """Refuse another λ than that of what is merged; to be called by a merged layer, whose root may not run.

        (Not in a backward pass, which recomputes what has been checked, nor while a compiler is tracing.)
        """
        if backward_pass() == -1 and contexts.get():
            self._check_merged()

    @torch.compiler.disable(recursive=True)
    def _ask_at_once(self) -> PerForwardCores | None:
        cores = self.ask()
        return None if cores is None else dict(cores)

    @torch.compiler.disable(recursive=True)
    def open(self) -> tuple[Scope, ...]:
        """To be called as a call of the root begins: layers ask, until `begin`. Returns what `close` takes."""
        outer = self.scopes
        self.local.scopes = (*outer, Scope(None, None))
        return outer

    @torch.compiler.disable(recursive=True)
    def close(self, outer: tuple[Scope, ...]) -> None:
        """To be called as that call of the root ends, in whatever way."""
        self.local.scopes = outer

    def begin(self, cores: PerForwardCores) -> None:
        """To be called by a pre-hook of the root: layers read `cores` until its call ends.

        Raises:
            RuntimeError: nothing would end it.
        """
        if not self.scopes:
            raise RuntimeError(
                "Something calls the forward hooks of an adapted model by itself, so that nobody would say when its "
                "C(λ) ends: call the model, `model(…)`."
            )
        self.local.scopes = (*self.scopes[:-1], Scope(cores, backward_pass(), _holding()))

    @contextmanager
    def using(self, cores: PerForwardCores) -> Iterator[None]:
        """Layers read `cores` inside; what they read before comes back afterwards."""
        outer = self.scopes
        self.local.scopes = (*outer, Scope(cores, backward_pass(), _holding()))
        try:
            yield
        finally:
            self.local.scopes = outer

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Layers ask inside, though a forward of the root may run, which was told something else before."""
        if not self.scopes:
            yield
            return
        own = Scope(None, backward_pass())
        self.local.scopes = (*self.scopes, own)
        try:
            yield
        finally:  # what generators have entered may end in any order
            self.local.scopes = tuple(scope for scope in self.scopes if scope is not own)
