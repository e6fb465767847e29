"""λ and the mask density of a batch, validated: float32 tensors (1,) or (b,) in [0, 1]; λ = 1 is pure noise."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

MASKED_SHARE = "masked_share"
"""The name of λ's definition for masked language models: masked tokens of the answer over all of its tokens."""

Level = float | Tensor | np.ndarray | Sequence[float]
"""One number in [0, 1], or one a sample."""


class NoiseSignals(NamedTuple):
    """The noise of a batch, as a core may read it: λ (b,) or (1,), and the mask density, likewise, or None."""

    noise_level: Tensor
    mask_density: Tensor | None = None


class NoiseSource(Protocol):
    """Computes λ from the arguments of a forward. `convention` names the definition of λ, e.g. "masked_share"."""

    convention: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals: ...


def arguments_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a forward of `module`, by name, in the order of its signature."""
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    return dict(list(given.items())[1:])


def as_signals(noise_level: Level, mask_density: Level | None = None) -> NoiseSignals:
    """Both by `as_signal`, with one length: a value for the whole batch is repeated to match one value a sample.

    Raises:
        ValueError: see `as_signal`; or two different lengths.
    """
    level = as_signal(noise_level)
    if mask_density is None:
        return NoiseSignals(level)
    density = as_signal(mask_density, "mask_density").to(level.device)
    if len(level) != len(density) and 1 not in (len(level), len(density)):
        raise ValueError(
            f"mask_density has {len(density)} values, noise_level {len(level)}: pass one value, or one a sample."
        )
    return NoiseSignals(*torch.broadcast_tensors(level, density))


def as_signal(value: Level, name: str = "noise_level") -> Tensor:
    """`value` as a new float32 tensor (1,) or (b,), with the gradient of a tensor.

    Raises:
        ValueError: not a number or one-dimensional, or an element that is NaN or outside [0, 1].
    """
    try:
        signal = as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}: pass a number in [0, 1], or a tensor or list, one a sample.") from None
    if signal.is_complex() or signal.dtype == torch.bool or signal.dim() > 1 or signal.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(signal.shape)} and dtype {signal.dtype}: "
            "pass one number, or a tensor of shape (batch,)."
        )
    signal = signal.clone().float().reshape(-1)  # a later write to `value` does not change λ
    _check_range(signal, name)
    return signal


@torch.compiler.disable(recursive=True)
def _check_range(signal: Tensor, name: str) -> None:
    if not bool(((signal >= 0) & (signal <= 1)).all()):
        raise ValueError(f"{name} is {signal.tolist()}: every value has to lie in [0, 1], where 1 is pure noise.")


def as_tensor(value: Any) -> Tensor:
    """`value` as a tensor; Python's real numbers and numpy's in float32, whatever torch's default dtype is."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        return torch.stack([as_tensor(one) for one in value])  # with their gradients
    tensor = torch.as_tensor(value)
    return torch.as_tensor(value, dtype=torch.float32) if tensor.is_floating_point() else tensor
