"""How C(λ) travels from the root of an adapted model to its layers, in forward, recomputation and compiled graphs.

The root's forward stores its cores in a thread-local and removes them when it ends. A layer that runs outside of a
forward of the root requests C, which is computed at once if λ is known. A layer that finds no C raises. So a layer
never reads an old C, or the C of another forward. (A forward does not switch to another async task, so that one
thread-local separates forwards; unlike a `ContextVar`, it can be read inside a compiled graph.)
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
"""The entered `with` blocks of λ, adapters and ablations; see context_stack.py."""

PerForwardCores = Mapping[tuple[str, str], Tensor]
"""(adapter name, group name) → C (b or 1, r, r)."""


def backward_pass() -> int | None:
    """The number of the backward pass that runs in this thread: −1 outside of any, None while a compiler traces."""
    return None if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def is_current(backward: int | None) -> bool:
    """Whether values stored during backward pass `backward` (−1: none) may be read now: a later pass may not."""
    now = backward_pass()
    return backward is None or now is None or backward == now


class Scope(NamedTuple):
    """The cores of one running forward of the root, or of a part of it.

    Attributes:
        cores: the per-forward cores; None if a layer has to request them.
        backward: `backward_pass()` at the start of the forward.
        entered: the contexts that were active at the start.
    """

    cores: PerForwardCores | None
    backward: int | None
    entered: tuple[Any, ...] = ()


def _holds(entry: Any) -> bool:
    """Whether `entry` is active: if a generator entered it, only while that generator runs."""
    return entry.generator is None or is_running(entry.generator.call)


def _holding() -> tuple[Any, ...]:
    entered = contexts.get()
    if torch.compiler.is_compiling():  # which cannot trace a look at calls, and whose layers don't ask for that
        return entered
    return tuple(entry for entry in entered if _holds(entry))


class CoreChannel:
    """Hands C(λ) from the root of one adapted model to its layers, for the thread and time of one forward.

    Args:
        ask: computes the cores for a part of the model that is called by itself; None if λ is not known.
        check_merged: raises if λ differs from that of the merged adapters.
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
        """The running forwards of this thread, the innermost last."""
        return getattr(self.local, "scopes", ())

    @property
    def cores(self) -> PerForwardCores | None:
        """The cores for the layers that run now; None if there are none.

        A backward pass that began after the forward gets None: it recomputes a part of another forward.
        """
        scope = self.scopes[-1] if self.scopes else Scope(None, None)
        if torch.compiler.is_compiling():
            # compiled code cannot compare backward passes: do not run the backward pass of your own checkpoint around a
            # separately compiled block while another forward of the model runs
            return self._ask_at_once() if scope.cores is None else scope.cores
        if scope.cores is None or self._is_told_otherwise(scope):
            return self.ask()
        return scope.cores if is_current(scope.backward) else None

    def _is_told_otherwise(self, scope: Scope) -> bool:
        """Whether a context is active that was not active when `scope` began."""
        own = (entry for entry in contexts.get() if entry.is_open and self in entry.channels)
        return any(entry not in scope.entered and _holds(entry) for entry in own)

    def check_merged(self) -> None:
        """Raises ValueError if λ differs from that of the merged adapters. A merged layer calls it before its forward.

        It does nothing in a backward pass, which recomputes a checked forward, nor while a compiler traces.
        """
        if backward_pass() == -1 and contexts.get():
            self._check_merged()

    @torch.compiler.disable(recursive=True)
    def _ask_at_once(self) -> PerForwardCores | None:
        cores = self.ask()
        return None if cores is None else dict(cores)

    @torch.compiler.disable(recursive=True)
    def open(self) -> tuple[Scope, ...]:
        """Start a call of the root: until `begin`, layers request their cores. Returns the argument of `close`."""
        outer = self.scopes
        self.local.scopes = (*outer, Scope(None, None))
        return outer

    @torch.compiler.disable(recursive=True)
    def close(self, outer: tuple[Scope, ...]) -> None:
        """End that call of the root, also after an error."""
        self.local.scopes = outer

    def begin(self, cores: PerForwardCores) -> None:
        """Give `cores` to the layers until the call of the root ends. A pre-hook of the root calls it.

        Raises:
            RuntimeError: the root's hooks run outside of a call of the root, so that `close` would never be called.
        """
        if not self.scopes:
            raise RuntimeError(
                "The forward hooks of an adapted model were called without the model, so that its C(λ) would outlive "
                "the forward: call the model itself, `model(…)`."
            )
        self.local.scopes = (*self.scopes[:-1], Scope(cores, backward_pass(), _holding()))

    @contextmanager
    def using(self, cores: PerForwardCores) -> Iterator[None]:
        """Give `cores` to the layers inside the context, and restore the previous ones afterwards."""
        outer = self.scopes
        self.local.scopes = (*outer, Scope(cores, backward_pass(), _holding()))
        try:
            yield
        finally:
            self.local.scopes = outer

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Inside the context, layers request new cores, also while a forward of the root runs that began before it."""
        if not self.scopes:
            yield
            return
        own = Scope(None, backward_pass())
        self.local.scopes = (*self.scopes, own)
        try:
            yield
        finally:  # contexts that generators have entered may end in any order
            self.local.scopes = tuple(scope for scope in self.scopes if scope is not own)
