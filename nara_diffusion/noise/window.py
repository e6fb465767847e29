"""The window of noise levels that training draws λ from, and how many samples are drawn outside of it.

    inside:  min ≤ λ < max, and λ = 1 too where max is 1

Where the base is held outside, a share p of the samples is drawn there. One number u ~ U[0, 1) a sample decides both,
whether it is inside and where:

    u < 1 − p:  inside,  at v = u / (1 − p) of the window
    u ≥ 1 − p:  outside, at v = (u − 1 + p) / p of the rest

so that v is uniform too, and stratified where u is: of n stratified u, n (1 − p) lie inside, each in its own of as many
equal parts of the window, and n p outside likewise (one more or fewer where that is no whole number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .strength_schedule import StrengthSchedule

_BELOW_ONE = 1 - 2**-53


@dataclass(frozen=True)
class NoiseWindow:
    """See the module's docstring.

    Attributes:
        low, high: min and max.
        hold_weight: W, the weight of the distance to the base outside of it; None draws nothing there.
        outside_share: p; None is the share of all noise levels that lies outside, so that λ is spread as without a
            window.

    Raises:
        ValueError: a window without a λ of [0, 1], a weight that isn't above 0, a share that isn't between 0 and 1.
    """

    low: float = 0.0
    high: float = 1.0
    hold_weight: float | None = None
    outside_share: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"low is {self.low} and high {self.high}, expected 0 ≤ low < high ≤ 1: λ is 1 at pure noise, and "
                "timestep 700 of 1000 is 0.7."
            )
        if self.hold_weight is not None and not 0 < self.hold_weight < math.inf:
            raise ValueError(f"hold_weight is {self.hold_weight}, expected a number above 0, or None to hold nothing.")
        if self.outside_share is not None and not 0 < self.outside_share < 1:
            raise ValueError(f"outside_share is {self.outside_share}, expected a number between 0 and 1, or None.")

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

    def held(self, noise_level: Tensor) -> Tensor:
        """At which λ (b,) the base is held, (b,) bool."""
        if self.hold_weight is None:
            return torch.zeros_like(noise_level, dtype=torch.bool)
        return ~self.contains(noise_level)

    def divide(self, u: Tensor, outside: float) -> tuple[Tensor, Tensor]:
        """(v, is outside) (b,) of u (b,) in [0, 1); `outside` is the share of all noise levels that lies outside."""
        share = 0.0 if self.hold_weight is None else outside if self.outside_share is None else self.outside_share
        if share == 0:
            return u, torch.zeros_like(u, dtype=torch.bool)
        is_outside = u >= 1 - share
        v = torch.where(is_outside, (u - (1 - share)) / share, u / (1 - share))
        return v.clamp(0, _BELOW_ONE), is_outside


EVERYTHING = NoiseWindow()
