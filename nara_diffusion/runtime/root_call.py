"""The call of an adapted model's root: the layers' cores are removed when it ends, also after an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._dynamo.decorators import skip

from .channel import CoreChannel


class RootCall:
    """Replaces methods of the instance `root`, to remove the cores of its forward in a `finally`.

    A forward hook cannot do that: `nn.Module` runs none after a KeyboardInterrupt or SystemExit, nor in a compiled
    graph after an error. The next call of a part of the root would then read old cores.

    Args:
        compiled: the compiled call, if `root.compile()` was called before.
    """

    def __init__(self, root: nn.Module, channel: CoreChannel, compiled: Callable[..., Any] | None) -> None:
        self.root = root
        self.channel = channel
        self.compiled = compiled

    @skip  # like the original method, which is not compiled itself: graphs begin with `forward`
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
    """Make calls of `root` remove the cores of `channel` when they end."""
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
