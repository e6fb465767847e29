"""λ, the noise level: its unit, and how a value is checked.

λ is a float32 tensor (1,), (b,) or (b, k) in [0, 1]; 1 is pure noise. Its values are checked on the
host only if it is on the CPU. On another device, a λ outside [0, 1] becomes NaN, and so does the
output.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

Level = float | Tensor | np.ndarray | Sequence[float]
"""One number in [0, 1], or one for each sample."""


def arguments_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a forward of `module` by name, in the order of its signature."""
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    return dict(list(bound.items())[1:])


def as_level(value: Level, *, axes: int = 1) -> Tensor:
    """Return `value` as a new float32 tensor (1,) or (b,) in [0, 1], or (b, k) if `axes` is 2.

    If `value` is a tensor, gradients flow to it. If that tensor is not on the CPU, values outside
    [0, 1] become NaN.

    Raises:
        ValueError: `value` has a wrong shape, or contains a number outside [0, 1].
    """
    try:
        level = as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"noise_level is {value!r}: pass a number in [0, 1], or a tensor or list with one value per sample."
        ) from None
    if level.is_complex() or level.dtype == torch.bool or level.dim() > axes or level.numel() == 0:
        raise ValueError(
            f"noise_level has shape {tuple(level.shape)} and dtype {level.dtype}: "
            f"pass one number, or a tensor of shape (batch,){' or (batch, parts)' * (axes - 1)}."
        )
    level = torch.atleast_1d(level.clone().float())  # later writes to `value` don't change λ
    return _in_range(level)


@torch.compiler.disable(recursive=True)
def _in_range(level: Tensor) -> Tensor:
    values = host_values(level)
    if values is None:
        return nan_outside(level)
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"noise_level is {values}: every value has to lie in [0, 1], where 1 is pure noise."
        )
    return level


def host_values(tensor: Tensor) -> list[Any] | None:
    """Return the values of a CPU tensor as a flat list, or None for any other tensor.

    Reading a tensor on another device would block until that device is done, and fake tensors have
    no values.
    """
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
        return None
    return tensor.reshape(-1).tolist()


def nan_outside(level: Tensor, slack: float = 0.0) -> Tensor:
    """Return λ with NaN for values outside [−slack, 1 + slack], without a copy to the host."""
    return level.where((level - 0.5).abs() <= 0.5 + slack, torch.nan)


def one_if_expanded(values: Tensor) -> Tensor:
    """Return `values` (b, …), or only the first as (1, …) if one value was expanded to the batch.

    An expanded tensor has a stride of zero. After an operation such as a cast, it no longer does.
    """
    return values[:1] if values.dim() > 0 and values.stride(0) == 0 else values


def as_tensor(value: object) -> Tensor:
    """Return `value` as a tensor.

    Real numbers from Python and NumPy become float32, whatever the default dtype of torch is.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        return torch.stack([as_tensor(one) for one in value])  # keeps the gradients
    tensor = torch.as_tensor(value)
    return torch.as_tensor(value, dtype=torch.float32) if tensor.is_floating_point() else tensor


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a real number (not a bool) and its square fits into float32."""
    return isinstance(value, Real) and not isinstance(value, bool) and -1e9 <= float(value) <= 1e9
