"""Tensors that this package takes for those of another device than the CPU, and that can still be computed with."""

from __future__ import annotations

import torch
from torch import Tensor


class Elsewhere(Tensor):
    """A tensor that the host must not read. Tests get its values back with `values_of`."""


def elsewhere(values: object, dtype: torch.dtype = torch.float32) -> Tensor:
    """`values` as a tensor of another device."""
    return torch.as_tensor(values, dtype=dtype).as_subclass(Elsewhere)  # type: ignore[type-var]


def values_of(tensor: Tensor) -> list[float]:
    """The values of a tensor of another device."""
    return tensor.detach().as_subclass(Tensor).tolist()
