"""Define the strength of an adapter as a function of λ.

    ΔW(λ) = s(λ) · α/r · B C(λ) A            also inside DoRA's norm of W0 + ΔW(λ)

s is piecewise linear between points (λ, strength), and constant before the first and after the last
point. Two points at one λ make a step: the first applies below that λ, the second from that λ on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .level import Level, NoiseWindow, as_level, is_number

_EXAMPLE = "StrengthSchedule([(0, 1.0), (0.7, 0.3)])"


class StrengthSchedule:
    """An adapter's strength, piecewise linear in λ (1 = pure noise) and constant beyond its ends.

        StrengthSchedule([(0, 1.0), (0.7, 0.3)])              # 1 without noise, 0.3 from λ = 0.7 on
        StrengthSchedule([(0.5, 1.0), (0.5, 0.0)])            # 1 where λ < 0.5, 0 where λ ≥ 0.5

    Schedules with the same points are equal. λ is float32, so it is compared with the points in
    float32.

    Args:
        points: pairs (λ, strength), with λ in [0, 1] and in ascending order. At most two points may
            have the same λ.

    Raises:
        ValueError: there are no points, a point is not a pair of finite numbers, or λ is outside
            [0, 1] or out of order.
    """

    __slots__ = ("_table", "points")

    def __init__(self, points: Iterable[Sequence[float]]) -> None:
        self.points: tuple[tuple[float, float], ...] = tuple(_pairs(points))
        # (n, 2), copied to a device without waiting for it
        self._table = torch.tensor(self.points, dtype=torch.float32, device="cpu")
        levels = self._table[:, 0].tolist()
        for level, following in pairwise(levels):
            if following < level:
                raise ValueError(
                    f"points has λ {following:g} after λ {level:g}: pass the points by ascending λ."
                )
        if any(first == last for first, last in zip(levels, levels[2:], strict=False)):
            raise ValueError(
                "points has three points at one λ, and the middle one would never apply: pass at most two."
            )

    def __call__(self, noise_level: Level) -> Tensor:
        """Return s(λ) (b,), float32, for λ (b,); (1,) for a number.

        Raises:
            ValueError: λ is outside [0, 1], is NaN or has a wrong shape.
        """
        return self.at(as_level(noise_level))

    def at(self, noise_level: Tensor) -> Tensor:
        """Return s(λ) (b,) for λ (b,), float32 in [0, 1]."""
        levels, strengths = self._table.to(noise_level.device, non_blocking=True).T  # (n,) each
        passed = (noise_level[:, None] >= levels).sum(1)  # (b,), number of points at or below λ
        below, above = (passed - 1).clamp(min=0), passed.clamp(max=len(levels) - 1)
        gap = levels[above] - levels[below]
        share = (noise_level - levels[below]) * (gap > 0) / gap.where(gap > 0, 1.0)
        return strengths[below] + share * (strengths[above] - strengths[below])

    def as_lists(self) -> list[list[float]]:
        """Return the points as nested lists, ready for JSON."""
        return [list(point) for point in self.points]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StrengthSchedule) and self.points == other.points

    def __hash__(self) -> int:
        return hash(self.points)

    def __repr__(self) -> str:
        return f"StrengthSchedule({list(self.points)})"


def within(window: NoiseWindow) -> StrengthSchedule:
    """Return a schedule that is 1 inside a window and 0 elsewhere."""
    low, high = window.low, window.high
    below = [(low, 0.0), (low, 1.0)] if low > 0 else []
    above = [(high, 1.0), (high, 0.0)] if high < 1 else []
    return StrengthSchedule(below + above or [(0.0, 1.0)])


def _pairs(points: Any) -> Iterator[tuple[float, float]]:
    is_list = isinstance(points, Iterable) and not isinstance(points, (str, bytes, dict))
    pairs: list[Any] = list(points) if is_list else []
    if not pairs:
        raise ValueError(
            f"points is {points!r}: pass at least one pair (λ, strength), e.g. {_EXAMPLE}."
        )
    for point in pairs:
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
                f"points holds {point!r}, but λ lies in [0, 1], where 1 is pure noise. Divide a timestep by the "
                "length of its schedule, usually 1000."
            )
        yield float(point[0]), float(point[1])
