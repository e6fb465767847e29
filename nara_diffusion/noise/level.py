"""λ, the noise level: its unit, how a value is checked, and the levels that training draws.

λ is a float32 tensor (1,), (b,) or (b, k) in [0, 1]; 1 is pure noise. Its values are checked on the
host only if it is on the CPU. On another device, a λ outside [0, 1] becomes NaN, and so does the
output. Training draws λ from a window, stratified over a global batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    if values is not None and not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"noise_level is {values}: every value has to lie in [0, 1], where 1 is pure noise."
        )
    return nan_outside(level) if values is None else level


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


Generators = Callable[[int], np.random.Generator]


@dataclass(frozen=True)
class NoiseWindow:
    """The range that training draws λ from: low ≤ λ < high, and also λ = 1 if high is 1.

    Raises:
        ValueError: the bounds do not satisfy 0 ≤ low < high ≤ 1.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"low is {self.low} and high {self.high}, expected 0 ≤ low < high ≤ 1: λ is 1 at pure noise, and "
                "timestep 700 of 1000 is 0.7."
            )

    @property
    def is_everything(self) -> bool:
        """Return whether the window contains every λ in [0, 1]."""
        return self.low <= 0 and self.high >= 1

    def contains(self, noise_level: Tensor) -> Tensor:
        """Return whether each λ (b,) lies inside the window, as (b,) bool, compared in float32."""
        levels = noise_level.float()
        low, high = levels.new_tensor(self.low), levels.new_tensor(self.high)
        return (levels >= low) & ((levels < high) | (high == 1))


EVERYTHING = NoiseWindow()


def stratified_uniform(
    indices: Sequence[int], group_size: int, shift: Generators, value: Generators
) -> np.ndarray:
    """Return u (b,), float64 in [0, 1), one draw for each index.

    The draws are independent if `group_size` is 1. A draw depends only on the sample's index, so a
    sample gets the same number in any process, at any batch size, in any order, and after resuming.
    In every group of n consecutive indices, each index falls into a different one of the n equal
    strata of [0, 1),

        u_i = ((i + shift) mod n + v_i) / n,   shift ~ U{0 … n − 1} per group,  v_i ~ U(0, 1)

    so each u_i is still uniform, while the mean over the group varies far less.

    Args:
        indices: indices of the samples in the training stream.
        group_size: n, the number of samples in a global batch, 1 or more.
        shift: returns the random generator for a group's shift, given the group's number.
        value: returns the random generator for a sample's v, given the sample's index.
    """
    n = group_size
    shifts = {group: int(shift(group).integers(n)) for group in {i // n for i in indices}}
    return np.array([((i + shifts[i // n]) % n + value(i).random()) / n for i in indices])
