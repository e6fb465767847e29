"""The call of an adapted model's root: what its layers read ends with it, however it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._dynamo.decorators import skip

from .channel import CoreChannel


class RootCall:
    """Stands in for methods of `root`.

    A forward hook would not do to end what layers read: `nn.Module` runs none after a KeyboardInterrupt or SystemExit,
    nor in a compiled graph after any error, and it would stay for whoever calls a part of the root next.

    Args:
        compiled: what `root.compile()` has made of its call before this stands in for it, if it has.
    """

    def __init__(self, root: nn.Module, channel: CoreChannel, compiled: Callable[..., Any] | None) -> None:
        self.root = root
        self.channel = channel
        self.compiled = compiled

    @skip  # as the original, which is not compiled itself: graphs begin with `forward`
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the hooks of `root` and its `forward`."""
        outer = self.channel.open()
        try:
            return type(self.root)._call_impl(self.root, *args, **kwargs)
        finally:
            self.channel.close(outer)

    @skip
    def _compiled_call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """The same, compiled."""
        outer = self.channel.open()
        try:
            return self.compiled(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.channel.close(outer)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A shallow copy of `root` for `nn.DataParallel`, whose calls are its own."""
        replica = type(self.root)._replicate_for_data_parallel(self.root)
        set_root_call(replica, self.channel)
        return replica


_METHODS = ("_call_impl", "_replicate_for_data_parallel")


def set_root_call(root: nn.Module, channel: CoreChannel) -> None:
    """Let calls of `root` end what layers of `channel` read."""
    call = RootCall(root, channel, root._compiled_call_impl)
    root.__dict__.update({name: getattr(call, name) for name in _METHODS})
    if call.compiled is not None:
        root._compiled_call_impl = call._compiled_call_impl


def remove_root_call(root: nn.Module) -> None:
    """Undo `set_root_call`."""
    for name in _METHODS:
        root.__dict__.pop(name, None)
    call = getattr(root._compiled_call_impl, "__self__", None)
    if isinstance(call, RootCall):
        root._compiled_call_impl = call.compiled
