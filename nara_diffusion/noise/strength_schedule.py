"""The strength of an adapter as a function of λ, and the window of λ that training draws from.

    ΔW(λ) = s(λ) · α/r · B C(λ) A            W0 + ΔW(λ) inside DoRA's norm, too

s is piecewise linear between points (λ, strength), and constant before the first and after the last. Two points at one
λ are a step: below that λ the first one counts, from that λ on the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .level import Level, as_level

_EXAMPLE = "StrengthSchedule([(0, 1.0), (0.7, 0.3)])"


class StrengthSchedule:
    """An adapter's strength, piecewise linear in λ (0 = no noise, 1 = pure noise) and constant beyond its ends.

        StrengthSchedule([(0, 1.0), (0.7, 0.3)])              # 1 without noise, 0.3 from λ = 0.7 on
        StrengthSchedule([(0.5, 1.0), (0.5, 0.0)])            # 1 where λ < 0.5, 0 where λ ≥ 0.5

    Schedules of the same points are equal. (λ and points are compared in float32, as λ is kept.)

    Args:
        points: pairs (λ, strength), λ in [0, 1] and in ascending order; at most two at one λ.

    Raises:
        ValueError: no points, what is no pair of finite numbers, λ outside of [0, 1] or out of order.
    """

    __slots__ = ("points",)

    def __init__(self, points: Iterable[Sequence[float]]) -> None:
        self.points: tuple[tuple[float, float], ...] = tuple(_pairs(points))
        levels = torch.tensor([level for level, _ in self.points], dtype=torch.float32).tolist()
        for before, after in pairwise(levels):
            if after < before:
                raise ValueError(
                    f"points has λ {after:g} after λ {before:g}: pass the points by ascending λ."
                )
        if any(first == last for first, last in zip(levels, levels[2:], strict=False)):
            raise ValueError(
                "points has three points at one λ, of which the middle one would never count: pass two."
            )

    def __call__(self, noise_level: Level) -> Tensor:
        """s(λ) (b,), float32, of λ (b,), or (1,) of a number.

        Raises:
            ValueError: λ is not in [0, 1], NaN or misshapen.
        """
        return self.at(as_level(noise_level))

    def at(self, noise_level: Tensor) -> Tensor:
        """s(λ) (b,) of λ (b,), float32 in [0, 1]."""
        levels, strengths = torch.tensor(
            self.points, dtype=torch.float32, device=noise_level.device
        ).T  # (n,) each
        passed = (noise_level[:, None] >= levels).sum(1)  # (b,), how many points are at or below λ
        below, above = (passed - 1).clamp(min=0), passed.clamp(max=len(levels) - 1)
        gap = levels[above] - levels[below]
        share = (noise_level - levels[below]) * (gap > 0) / gap.where(gap > 0, 1.0)
        return strengths[below] + share * (strengths[above] - strengths[below])

    def as_lists(self) -> list[list[float]]:
        """The points as JSON has them."""
        return [list(point) for point in self.points]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StrengthSchedule) and self.points == other.points

    def __hash__(self) -> int:
        return hash(self.points)

    def __repr__(self) -> str:
        return f"StrengthSchedule({list(self.points)})"


def is_number(value: Any) -> bool:
    """Whether `value` is a real number that float32 can reckon with, also squared, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and -1e9 <= float(value) <= 1e9


def _pairs(points: Any) -> Iterator[tuple[float, float]]:
    given = (
        list(points)
        if isinstance(points, Iterable) and not isinstance(points, (str, bytes, dict))
        else []
    )
    if not given:
        raise ValueError(
            f"points is {points!r}: pass at least one pair (λ, strength), e.g. {_EXAMPLE}."
        )
    for point in given:
        if (
            not isinstance(point, (tuple, list))
            or len(point) != 2
            or not all(map(is_number, point))
        ):
            raise ValueError(
                f"points holds {point!r}: pass pairs (λ, strength) of finite numbers, e.g. {_EXAMPLE}."
            )
        if not 0 <= point[0] <= 1:
            raise ValueError(
                f"points holds {point!r}, whose λ is {point[0]:g}: λ lies in [0, 1], where 1 is pure noise; a timestep "
                "t out of 1000 is λ = t / 1000."
            )
        yield float(point[0]), float(point[1])


@dataclass(frozen=True)
class NoiseWindow:
    """The noise levels that training draws λ from: low ≤ λ < high, and λ = 1 too where high is 1.

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
        """The strength of an adapter that is off outside: 1 where `contains` is true, else 0; None if always 1."""
        below = [(self.low, 0.0), (self.low, 1.0)] if self.low > 0 else []
        above = [(self.high, 1.0), (self.high, 0.0)] if self.high < 1 else []
        return StrengthSchedule(below + above) if below + above else None


EVERYTHING = NoiseWindow()
