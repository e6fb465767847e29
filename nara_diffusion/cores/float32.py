"""Modules that store and compute in float32, whatever the model does, and `Core`, their base."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_autocast_enabled(device: torch.device) -> bool:
    """Return whether autocast is on for `device`.

    "meta" has no autocast, and PyTorch raises an error for it.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off for `device` inside the context.

    Entering `torch.autocast` costs more than small products do, so it is entered only if autocast
    is on.
    """
    return (
        torch.autocast(device.type, enabled=False) if is_autocast_enabled(device) else nullcontext()
    )


class Float32Module(nn.Module):
    """A module with floating-point tensors that follow `.to(device)` but always stay float32.

    In bfloat16, C − I would change by five per cent, so `model.to(bfloat16)` leaves these tensors
    in float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Convert what is loaded, here and below, to float32.

        `assign=True` would keep the dtypes of `state_dict`, which is a copy.
        """
        for key, tensor in state_dict.items():
            if key.startswith(prefix) and isinstance(tensor, Tensor) and tensor.is_floating_point():
                state_dict[key] = tensor.float()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Core(Float32Module):
    """λ (b,) → the deviation D = C − I (b, r, r), or (1, r, r) if all samples share it; float32.

    D is small, and layers compute C h as h + D h, so that half precision does not round D away.

    Attributes:
        rank: r, the largest rank that reads this core. A layer of smaller rank r' reads
            C[:r', :r'].
        needs_noise: whether the core reads λ. If not, it is called without arguments.
    """

    needs_noise: bool = True

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def at(self, noise_level: Tensor | None = None) -> Tensor:
        """Return D (b or 1, r, r), float32, at λ on any device.

        A core without noise input ignores λ.
        """
        if not self.needs_noise:
            return self()
        assert noise_level is not None
        return self(noise_level.to(self._device(noise_level.device)))

    def _device(self, default: torch.device) -> torch.device:
        """Return the device of the tensors.

        Return `default` if there are no tensors, or if all are on "meta" until accelerate's hooks
        load them.
        """
        devices = [tensor.device for tensor in (*self.parameters(), *self.buffers())]
        found = next((device for device in devices if device.type != "meta"), None)
        if found is not None:
            return found
        is_offloaded = any("_hf_hook" in vars(module) for module in self.modules())
        return default if is_offloaded or not devices else devices[0]


class Dense(Float32Module):
    """y = x Wᵀ + b in float32, zero until `reset`.

    It is not an `nn.Linear`, so quantisers, casters and "all-linear" skip it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))

    def reset(self, zero: bool) -> None:
        """Set the weight to zero, or to Kaiming-uniform values with a = √5 (paper, appendix).

        The bias becomes zero in both cases.
        """
        nn.init.zeros_(self.bias)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias.float())
