"""What waits for a device: reads of its values by the host, counted on the CPU, and raised on fake tensors.

`HostReads` sees the ops below; `tolist` and `numpy` of a tensor on the CPU are no ops, and wait for nothing. On fake
tensors any read of a value raises, `tolist` included, so both together show that a step has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique", "_unique2")


class HostReads(TorchDispatchMode):
    """The names of the ops inside the context that read values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            self.names.append(name)
        elif name in ("index", "index_put", "index_put_") and any(
            is_mask(part) for part in args[1] if part is not None
        ):
            self.names.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def fake_mode() -> FakeTensorMode:
    """The mode for a step on fake tensors: inputs that are drawn on the CPU may be real."""
    return FakeTensorMode(allow_non_fake_inputs=True)
