"""How C(λ) travels from the root of an adapted model to its layers, in forward, recomputation and compiled graphs.

A frame exists only while the root's forward runs, and only for the thread that runs it: a layer that finds none
raises, so that C can be missing, but never stale or somebody else's. (A forward does not yield to another async task,
so a thread is separation enough; unlike a `ContextVar`, a thread-local can be read inside a compiled graph.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Frame = Mapping[tuple[str, str], Tensor]
"""(adapter name, group name) → C (b or 1, r, r)."""


class CoreChannel:
    """Hands C(λ) from the root of one adapted model to its layers, for the thread and time of one forward."""

    def __init__(self) -> None:
        self.local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return CoreChannel, ()

    @property
    def frame(self) -> Frame | None:
        return getattr(self.local, "frame", None)

    def begin(self) -> None:
        """A forward of the root begins: layers find an empty frame until `fill`."""
        self.local.outer = (*getattr(self.local, "outer", ()), self.frame)
        self.local.frame = {}

    def fill(self, frame: Frame) -> None:
        """Layers read `frame` until `end`."""
        self.local.frame = frame

    def end(self) -> None:
        """The forward is over: what was read before it began, usually nothing, is back."""
        outer = getattr(self.local, "outer", ())
        if outer:  # empty if somebody else's hook raised before `begin`
            self.local.outer, self.local.frame = outer[:-1], outer[-1]

    @contextmanager
    def using(self, frame: Frame) -> Iterator[None]:
        """Layers read `frame` inside; the previous frame comes back afterwards."""
        previous = self.frame
        self.local.frame = frame
        try:
            yield
        finally:
            self.local.frame = previous


class CheckpointWithCore:
    """Gradient checkpointing whose recomputation sees the C(λ) of its own forward.

    It stands in for a module's `_gradient_checkpointing_func` (Transformers and Diffusers both call that) and passes
    C as explicit tensor inputs, which is right for reentrant and non-reentrant checkpoints alike, in whatever thread
    the backward pass recomputes, and lets gradients flow from the block to C.
    """

    def __init__(self, checkpoint: Callable[..., Any], channel: CoreChannel) -> None:
        self.checkpoint = checkpoint
        self.channel = channel

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = self.channel.frame
        if not frame:
            return self.checkpoint(function, *args, **kwargs)
        keys = tuple(frame)

        def run(*inputs: Any, **run_kwargs: Any) -> Any:
            with self.channel.using(dict(zip(keys, inputs[: len(keys)], strict=True))):
                return function(*inputs[len(keys) :], **run_kwargs)

        return self.checkpoint(run, *frame.values(), *args, **kwargs)


def checkpoint_with_core(root: nn.Module, channel: CoreChannel) -> None:
    """Make every checkpointed block below `root` carry C(λ); called at each forward, harmless when repeated."""
    for module in root.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not _carries(checkpoint, channel):
            module._gradient_checkpointing_func = CheckpointWithCore(checkpoint, channel)  # type: ignore[assignment]


def checkpoint_without_core(root: nn.Module, channel: CoreChannel) -> None:
    """Undo `checkpoint_with_core`."""
    for module in root.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, CheckpointWithCore) and checkpoint.channel is channel:
            module._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]


def _carries(checkpoint: Any, channel: CoreChannel) -> bool:
    while isinstance(checkpoint, CheckpointWithCore):
        if checkpoint.channel is channel:
            return True
        checkpoint = checkpoint.checkpoint
    return False
