"""Recompute each gradient-checkpointed block with the C(λ) of its own forward.

Transformers, Diffusers and PyTorch's `CheckpointWrapper` (which FSDP uses) store the checkpoint
function as an attribute of a module, either the checkpointed block or the wrapper around it. The
core holder replaces each such function with one that passes C as explicit tensor inputs. This works
for reentrant and non-reentrant checkpoints, in whatever thread the backward pass recomputes, and
lets gradients flow from the block to C. With any other checkpoint function, the recomputed layers
find no C and raise an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nara_diffusion.layers.channel import CoreChannel, Key
from nara_diffusion.noise.parts import Parts

_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""The attributes that keep a checkpoint function: of Transformers and Diffusers, of PyTorch's wrapper."""


def pass_cores(
    root: nn.Module, channel: CoreChannel, check: Callable[[Callable[..., Any]], None]
) -> None:
    """Wrap the checkpoint function of every checkpointed block in `root`. Repeating is safe.

    Args:
        check: raises an error for a checkpoint function that the model cannot use.
    """
    for module, name, checkpoint in _checkpointed(root):
        if not (isinstance(checkpoint, CheckpointWithCore) and checkpoint.passes(channel)):
            check(checkpoint)
            setattr(module, name, CheckpointWithCore(checkpoint, channel))


def pass_no_cores(root: nn.Module, channel: CoreChannel) -> None:
    """Undo `pass_cores`.

    A wrapper inside another model's wrapper stays in place but no longer passes on cores.
    """
    for module, name, checkpoint in _checkpointed(root):
        if isinstance(checkpoint, CheckpointWithCore) and checkpoint.channel is channel:
            setattr(module, name, checkpoint.checkpoint)


def _checkpointed(root: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    """Yield (module, attribute, checkpoint function); adapted layers have none inside."""
    left = [root]
    while left:
        module = left.pop()
        for name in _CHECKPOINTS:
            checkpoint = vars(module).get(name)
            if callable(checkpoint):
                yield module, name, checkpoint
        if "lora_A" not in module._modules:
            left.extend(child for child in module._modules.values() if child is not None)


@dataclass(eq=False)
class CheckpointWithCore:
    """Call `checkpoint`, and pass the cores of `channel` from the forward to the recomputation."""

    checkpoint: Callable[..., Any]
    channel: CoreChannel

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        pushed = self.channel.pushed()
        if pushed is None or not pushed.deviations:
            return self.checkpoint(function, *args, **kwargs)
        cores = pushed.deviations
        with_cores = _WithCores(function, tuple(cores), pushed.parts, self.channel)
        return self.checkpoint(with_cores, *cores.values(), *args, **kwargs)

    def passes(self, channel: CoreChannel) -> bool:
        """Return whether this object, or one that it wraps, passes on the cores of `channel`.

        It wraps another such object if a part of an adapted model is itself an adapted model.
        """
        inner = self.checkpoint
        return self.channel is channel or (
            isinstance(inner, CheckpointWithCore) and inner.passes(channel)
        )


@dataclass(eq=False)
class _WithCores:
    """Call `function` with the cores of `keys` as additional leading arguments.

    This is an object rather than a closure because Diffusers reads its `__call__`, and a compiler
    cannot trace this attribute of a function.
    """

    function: Callable[..., Any]
    keys: tuple[Key, ...]
    parts: Parts | None
    channel: CoreChannel

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        cores, args = inputs[: len(self.keys)], inputs[len(self.keys) :]
        if torch.compiler.is_compiling() and self.channel.pushed() is not None:
            # traced as a part of the root's forward: the graph itself passes C to the recomputation
            return self.function(*args, **kwargs)
        with self.channel.using(dict(zip(self.keys, cores, strict=True)), self.parts):
            return self.function(*args, **kwargs)
