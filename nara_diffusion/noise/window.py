"""The window of noise levels that training draws λ from: min ≤ λ < max, and λ = 1 too where max is 1."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .strength_schedule import StrengthSchedule


@dataclass(frozen=True)
class NoiseWindow:
    """See the module's docstring.

    Attributes:
        low, high: min and max of λ.

    Raises:
        ValueError: a window without a λ of [0, 1].
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
        """Whether no λ in [0, 1] lies outside."""
        return self.low <= 0 and self.high >= 1

    def contains(self, noise_level: Tensor) -> Tensor:
        """Whether λ (b,) lies inside, (b,) bool, in float32 as λ is."""
        levels = noise_level.float()
        low, high = levels.new_tensor(self.low), levels.new_tensor(self.high)
        return (levels >= low) & ((levels < high) | (high == 1))

    def as_schedule(self) -> StrengthSchedule | None:
        """The strength of an adapter that is off outside: 1 where `contains` is true, else 0. None where it is so
        everywhere.
        """
        below = [(self.low, 0.0), (self.low, 1.0)] if self.low > 0 else []
        above = [(self.high, 1.0), (self.high, 0.0)] if self.high < 1 else []
        return StrengthSchedule(below + above) if below + above else None


EVERYTHING = NoiseWindow()
