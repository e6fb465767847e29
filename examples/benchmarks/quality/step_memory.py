"""The memory that a training step holds at its largest, counted in tensors: the same on every machine.

    weights + buffers + gradients + Adam's two moments + what the forward keeps for the backward

A process's high-water mark would depend on the allocator, and on the runs before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ADAM_MOMENTS = 2
MIB = 2**20


def step_memory_mib(model: nn.Module, forward: Callable[[], Tensor]) -> float:
    """MiB of a step of AdamW on `model`, whose loss `forward` computes."""
    kept: dict[int, int] = {}  # of each tensor's storage, once: its address and its bytes

    alive: list[torch.UntypedStorage] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        # not the tensor: a graph that keeps its own output through a hook is a cycle that nobody frees

    def unpack(_: None) -> Tensor:
        raise RuntimeError("this graph is for counting and has no backward")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = forward()
    owned = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    del loss
    return (sum((kept | owned).values()) + (1 + ADAM_MOMENTS) * trained) / MIB
