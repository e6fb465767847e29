"""The fields of a corrupted batch, and the interface that all objectives have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nara_diffusion.noise.timesteps import TimestepNoise


@dataclass(frozen=True)
class Corrupted:
    """A batch after corruption.

    Attributes:
        model_input: (b, c, h, w), what the denoiser sees.
        timestep: (b,), its argument, from which an adapter reads λ.
        target: (b, c, h, w), what it should return.
        weight: (b,), what the mean squared error of each sample counts.
    """

    model_input: Tensor
    timestep: Tensor
    target: Tensor
    weight: Tensor


class Objective(Protocol):
    """`source` tells λ from the timesteps of `corrupt`, which takes indices of `levels` noise levels."""

    source: TimestepNoise
    levels: int

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted: ...


def column(values: Tensor) -> Tensor:
    """(b,) float64 → (b, 1, 1, 1) float32."""
    return values.float()[:, None, None, None]
