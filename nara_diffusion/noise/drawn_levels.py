"""Draw the levels λ of a training: from a window, stratified over a global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

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
