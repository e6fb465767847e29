"""Frozen weights that are on the host while others run: blocks of a denoiser, or one of two denoisers.

`--block_swap N` swaps N blocks:

    forward     load block i, ask for block i + 1, run i, drop i
    backward    load block i, ask for block i − 1, run i again and differentiate it, drop i

A frozen weight is needed for the gradient of its layer's input, so each swapped block is checkpointed
and stays until its backward is done. The checkpoint is PyTorch's reentrant one: the other one keeps
the graph of the first forward, in which bitsandbytes stores 4-bit weights. For the same reason,
Diffusers' group offloading frees nothing during a backward.

On a GPU, a stream of its own copies from pinned memory.

Of the two denoisers of Wan 2.2, only the one that runs has its frozen weights on the device:

    forward of a denoiser    free the copy of the other one, copy this one's weights, run

A copy stays until the other denoiser runs, and so for the backward.

Weights are copied to the device only. Adapters, their gradients and the optimizer's states stay on
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .families import Family

SWAPS: WeakKeyDictionary[nn.Module, BlockSwap | ExpertSwap] = WeakKeyDictionary()
"""{denoiser: what swaps its weights}."""


def swappable(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks that `denoiser` repeats, in the order of their definition."""
    names: Any = getattr(denoiser, "_repeated_blocks", None) or denoiser._no_split_modules
    return [module for module in denoiser.modules() if type(module).__name__ in names]


def chosen_blocks(denoiser: nn.Module, count: int) -> list[nn.Module]:
    """Return `count` blocks at equal distances, so that others run while one is loaded.

    Raises:
        ValueError: the model has fewer blocks.
    """
    blocks = swappable(denoiser)
    if count > len(blocks):
        raise ValueError(
            f"block_swap is {count}, but the model has {len(blocks)} blocks: give at most that many."
        )
    return [blocks[i * len(blocks) // count] for i in range(count)]


Weights = list[tuple[nn.Parameter, Tensor]]
"""Frozen parameters with their values on the host."""


def host_weights(module: nn.Module, device: torch.device) -> Weights:
    """Return the parameters of a frozen module on the CPU, with values that a GPU can copy fast."""
    pairs = []
    for parameter in module.parameters():
        # bitsandbytes' own class of 4-bit weights doesn't copy
        host = parameter.data.as_subclass(Tensor)
        pairs.append((parameter, host if device.type == "cpu" else host.pin_memory()))
    return pairs


def empty(weights: Weights, device: torch.device) -> None:
    """Free the copies of weights on a device."""
    for parameter, host in weights:
        parameter.data = torch.empty(0, dtype=host.dtype, device=device)


class BlockSwap:
    """The weights of the swapped blocks of denoisers that share them.

    Args:
        denoiser: a frozen model without an adapter, on the CPU.
        count: the number of blocks.
        device: the device that the blocks run on.
    """

    def __init__(self, denoiser: nn.Module, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self.stream = None if device.type == "cpu" else torch.Stream(device=device)
        self.weights: list[Weights] = []
        self.copied: dict[int, Any] = {}  # {loaded block: event at the end of its copy}
        self.differentiated: set[int] | None = None  # blocks of the present backward
        for block in chosen_blocks(denoiser, count):
            self.weights.append(host_weights(block, device))
        for number in range(count):
            self.drop(number)

    def attach(self, denoiser: nn.Module) -> None:
        """Swap the blocks of `denoiser`, which has the weights of this object."""
        SWAPS[denoiser] = self
        for number, block in enumerate(chosen_blocks(denoiser, self.count)):
            block.register_forward_pre_hook(partial(self.enter, number))
            block.register_forward_hook(partial(self.leave, number), always_call=True)

    def load(self, number: int) -> None:
        """Start to copy a block to the device, unless it is there or there is no such block."""
        if number in self.copied or not 0 <= number < self.count:
            return
        with self.stream or torch.no_grad():
            for parameter, host in self.weights[number]:
                parameter.data = host.to(self.device, non_blocking=True, copy=True)
            self.copied[number] = self.stream and self.stream.record_event()

    def drop(self, number: int) -> None:
        """Free the copy of a block on the device."""
        self.copied.pop(number, None)
        empty(self.weights[number], self.device)

    def enter(self, number: int, *_: object) -> None:
        self.load(number)
        self.load(number + (1 if self.differentiated is None else -1))
        self.wait(number)

    def wait(self, number: int) -> None:
        """Let the present stream wait for the copy of a loaded block."""
        if self.stream is not None:
            present = torch.accelerator.current_stream()
            present.wait_event(self.copied[number])
            for parameter, _host in self.weights[number]:
                parameter.data.record_stream(present)

    def leave(self, number: int, *_: object) -> None:
        if self.differentiated is None:
            self.drop(number)
        else:
            self.differentiated.add(number)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Keep the blocks that run inside the context until its end."""
        self.differentiated = set()
        try:
            yield
        finally:
            numbers, self.differentiated = self.differentiated, None
            for number in numbers:
                self.drop(number)

    @contextmanager
    def whole(self, denoiser: nn.Module) -> Iterator[None]:
        """Keep all blocks on the device inside the context."""
        for number in range(self.count):
            self.load(number)
            self.wait(number)
        try:
            yield
        finally:
            for number in range(self.count):
                self.drop(number)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function`, and again in the backward. This is a checkpoint function for Diffusers."""
        needed = torch.ones((), requires_grad=True)
        return _Recomputed.apply(_Block(self, function), True, needed, *args)


class _Block:
    """A function that a `_Recomputed` calls; `needed` makes the result differentiable."""

    def __init__(self, swap: BlockSwap, function: Callable[..., Any]) -> None:
        self.swap, self.function = swap, function

    def __call__(self, needed: Tensor, *args: Any) -> Any:
        output = self.function(*args)
        tensors = output if isinstance(output, tuple) else (output,)
        if not torch.is_grad_enabled() or any(x is not None and x.requires_grad for x in tensors):
            return output
        return tuple(x if x is None else x + 0 * needed for x in tensors)  # nothing is trained here


class _Recomputed(CheckpointFunction):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with ctx.run_function.swap.backward():
            return CheckpointFunction.backward(ctx, *gradients)


class ExpertSwap:
    """The weights of the denoisers of `pipe`, which are frozen, on the CPU and without adapters."""

    def __init__(self, pipe: DiffusionPipeline, family: Family, device: torch.device) -> None:
        self.device = device
        self.names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.weights: dict[str, Weights] = {}
        for name in family.denoisers:
            self.weights[name] = host_weights(getattr(pipe, name), device)
            empty(self.weights[name], device)
        self.present: str | None = None  # the denoiser on the device
        self.attach(pipe)

    def attach(self, pipe: DiffusionPipeline) -> None:
        """Swap the denoisers of a pipeline that has the weights of this object."""
        for name in self.weights:
            denoiser = getattr(pipe, name)
            self.names[denoiser], SWAPS[denoiser] = name, self
            denoiser.to(self.device)
            denoiser.register_forward_pre_hook(self.enter)

    def enter(self, denoiser: nn.Module, _: object) -> None:
        """Bring the weights of a denoiser to the device."""
        name = self.names[denoiser]
        if name == self.present:
            return
        self.leave()
        for parameter, host in self.weights[name]:
            parameter.data = host.to(self.device, non_blocking=True, copy=True)
        self.present = name

    def leave(self) -> None:
        """Free the copy on the device."""
        if self.present is not None:
            empty(self.weights[self.present], self.device)
        self.present = None

    @contextmanager
    def whole(self, denoiser: nn.Module) -> Iterator[None]:
        """Keep all of `denoiser` on the CPU inside the context, since both can't be on the device."""
        self.leave()
        weights = self.weights[self.names[denoiser]]
        for parameter, host in weights:
            parameter.data = host
        denoiser.to("cpu")
        try:
            yield
        finally:
            empty(weights, self.device)
            denoiser.to(self.device)


def checkpoint_of(denoiser: nn.Module) -> Callable[..., Any] | None:
    """Return the checkpoint function of a denoiser with swapped blocks; None without them."""
    swap = SWAPS.get(denoiser)
    return swap.checkpoint if isinstance(swap, BlockSwap) else None


@contextmanager
def resident(*denoisers: nn.Module) -> Iterator[None]:
    """Keep the weights of models whole inside the context: adapters are made from them."""
    with ExitStack() as stack:
        for denoiser in denoisers:
            if denoiser in SWAPS:
                stack.enter_context(SWAPS[denoiser].whole(denoiser))
        yield
