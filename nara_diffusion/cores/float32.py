"""Modules that store and compute in float32 whatever the model around them does, and `Core`, the base of all cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for `device`. "meta" has none, and PyTorch raises if it is asked about it."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, nothing is converted on `device`. Entering `torch.autocast` costs more than small products, so that it is
    done only where autocast is on."""
    return (
        torch.autocast(device.type, enabled=False) if is_autocast_enabled(device) else nullcontext()
    )


class Float32Module(nn.Module):
    """A module whose floating-point tensors follow `.to(device)` but never leave float32.

    `model.to(bfloat16)` would change C − I by five per cent, so that it moves these tensors without converting them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Convert what is loaded, here and below, since `assign=True` keeps the dtypes of `state_dict`, a copy."""
        for key, tensor in state_dict.items():
            if key.startswith(prefix) and isinstance(tensor, Tensor) and tensor.is_floating_point():
                state_dict[key] = tensor.float()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Core(Float32Module):
    """λ (b,) → C (b, r, r), or (1, r, r) where all samples share it; float32.

    Attributes:
        rank: r, the largest rank that reads this core. A layer of smaller rank r' reads C[:r', :r'].
        needs_noise: whether it reads λ; it is called without arguments if not.
    """

    needs_noise: bool = True

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def at(self, noise_level: Tensor | None = None) -> Tensor:
        """C (b or 1, r, r), float32, at λ on any device; a core without noise input doesn't read it."""
        if not self.needs_noise:
            return self()
        assert noise_level is not None
        return self(noise_level.to(self._device(noise_level.device)))

    def _device(self, default: torch.device) -> torch.device:
        """The device of the tensors; `default` without any, or if all are on "meta" until accelerate's hooks come."""
        devices = [tensor.device for tensor in (*self.parameters(), *self.buffers())]
        found = next((device for device in devices if device.type != "meta"), None)
        if found is not None:
            return found
        is_offloaded = any("_hf_hook" in vars(module) for module in self.modules())
        return default if is_offloaded or not devices else devices[0]


class Dense(Float32Module):
    """y = x Wᵀ + b in float32, zero until `reset`.

    It is not an `nn.Linear`, so that quantisers, casters and "all-linear" skip it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))

    def reset(self, zero: bool) -> None:
        """Zero weight, or Kaiming-uniform with a = √5; the bias is zero in both cases (paper, appendix)."""
        nn.init.zeros_(self.bias)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias.float())
