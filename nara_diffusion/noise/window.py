"""The noise levels that training draws: a window of them, and random numbers in strata.

Random numbers depend only on the samples' indices in the training stream: a sample gets the same
number in any process, at any batch size, in any order, and in a resumed run. In every group of
n = `group_size` consecutive indices, each index takes one of the n equal strata of [0, 1),

    u_i = ((i + shift) mod n + v_i) / n,   shift ~ U{0 … n − 1} a group,  v_i ~ U(0, 1) a sample

so that each u_i is still uniform, while the mean over the group varies far less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .strength_schedule import StrengthSchedule

Generators = Callable[[int], np.random.Generator]


@dataclass(frozen=True)
class NoiseWindow:
    """The noise levels that training draws λ from: low ≤ λ < high, and also λ = 1 if high is 1.

    Raises:
        ValueError: not 0 ≤ low < high ≤ 1.
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
        """True if every λ in [0, 1] lies inside."""
        return self.low <= 0 and self.high >= 1

    def contains(self, noise_level: Tensor) -> Tensor:
        """Return whether each λ (b,) lies inside, (b,) bool, compared in float32."""
        levels = noise_level.float()
        low, high = levels.new_tensor(self.low), levels.new_tensor(self.high)
        return (levels >= low) & ((levels < high) | (high == 1))

    def as_schedule(self) -> StrengthSchedule | None:
        """Return the strength that turns an adapter off outside the window; None if always 1.

        It is 1 where `contains` is true, and 0 elsewhere.
        """
        below = [(self.low, 0.0), (self.low, 1.0)] if self.low > 0 else []
        above = [(self.high, 1.0), (self.high, 0.0)] if self.high < 1 else []
        return StrengthSchedule(below + above) if below + above else None


EVERYTHING = NoiseWindow()


def stratified_uniform(
    indices: Sequence[int], group_size: int, shift: Generators, value: Generators
) -> np.ndarray:
    """Return u (b,), float64 in [0, 1), for each index; independent draws if the group is 1.

    Args:
        indices: indices of the samples in the training stream.
        group_size: n, the samples of a global batch, 1 or more.
        shift: the generator of a group's shift, by the group's number.
        value: the generator of a sample's v, by its index.
    """
    n = group_size
    shifts = {group: int(shift(group).integers(n)) for group in {i // n for i in indices}}
    return np.array([((i + shifts[i // n]) % n + value(i).random()) / n for i in indices])
