"""Measure the memory of a computation, in bytes of all tensor storages that exist at once.

The operations run on fake tensors, which have a shape, dtype and device, but no data:

    counter = LiveStorages(tensors_of(model))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        to_fake(model, mode)         # a model on the meta device
        with counter: model(…).loss.backward()
    counter.peak

The counter works for real tensors too. A storage counts from the operation that returns it until
Python frees it. Views share one storage. Sizes aren't rounded up to the blocks of an allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """Count the storages that operations inside the context return.

    Args:
        known: existing tensors, such as weights, which are not counted.

    Attributes:
        live: bytes of the counted storages that currently exist.
        peak: the highest value of `live` since the start, or since `peak` was last set.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._references: dict[int, weakref.ref] = {}
        for tensor in known:
            self._add(tensor, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value, value.untyped_storage().nbytes())
        return result

    def _add(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._references:
            return

        def forget(_: weakref.ref) -> None:
            del self._references[key]
            self.live -= size

        self._references[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace all parameters and buffers of `model` with fake CPU tensors of `mode`, in place.

    Shapes, strides, dtypes, `requires_grad` and tied weights are kept. `Module.to` can't be used
    instead, since it fails on fake tensors.

    Args:
        model: a model on any device. On the meta device it takes no memory.
    """
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            shape: Any = (tensor.size(), tensor.stride())
            new = torch.empty_strided(*shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = new
        return fakes[id(tensor)]

    with mode:
        for module in model.modules():
            registries: Any = (module._parameters, module._buffers)
            for tensors in registries:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor)


def tensors_of(*models: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of `models`, each once."""
    together = nn.ModuleList(models)
    return [*together.parameters(), *together.buffers()]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the total size of `tensors` in bytes."""
    return sum(tensor.nbytes for tensor in tensors)
