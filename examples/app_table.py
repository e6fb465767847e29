"""The table of app.py: points (λ, strength) of each adapter, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app_adapters import Adapter, Points

from nara_diffusion import StrengthSchedule
from nara_diffusion.noise.strength import is_number

COLUMNS = ["adapter", "λ", "strength"]
Row = Sequence[Any]
"""The adapter's number, from 1 on; λ; its strength there. Empty cells are None or an empty text."""


def rows_of(adapters: Sequence[Adapter]) -> list[Row]:
    """The table with the strengths that the adapters bring."""
    return [[number, *point] for number, adapter in enumerate(adapters, start=1) for point in adapter.points]


def rows_for(adapters: Sequence[Adapter], shown: Sequence[Adapter], rows: Sequence[Row]) -> list[Row]:
    """`rows`, unless they were made of other adapters, those `shown`; then a fresh table."""
    same = [adapter.source for adapter in adapters] == [adapter.source for adapter in shown]
    return list(rows) if rows and (same or not shown) else rows_of(adapters)


def with_a_point(rows: Sequence[Row]) -> list[Row]:
    """One row more, half-way from the last one's λ to 0, to be edited."""
    number, level, strength = (1, 1.0, 1.0)
    if rows and all(isinstance(cell, (int, float)) for cell in rows[-1]):
        number, level, strength = rows[-1]
    return [*rows, [number, level / 2, strength]]


def points_of(rows: Sequence[Row], adapters: Sequence[Adapter]) -> list[Points]:
    """The points of each adapter by ascending λ; those that it brings, where the table has none of it.

    Raises:
        ValueError: a row without its numbers, or of an adapter that isn't named; or see `StrengthSchedule`.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in adapters]
    for place, row in enumerate(rows, start=1):
        if all(cell is None or cell == "" for cell in row):
            continue
        number, level, strength = _numbers(place, row)
        if number not in range(1, len(adapters) + 1):
            raise ValueError(f"Row {place} of the strengths is of adapter {number:g}, of 1 to {len(adapters)}.")
        found[int(number) - 1].append((level, strength))
    ordered = [sorted(own, key=lambda point: point[0]) for own in found]
    return [StrengthSchedule(own or adapter.points).points for own, adapter in zip(ordered, adapters, strict=True)]


def _numbers(place: int, row: Row) -> list[float]:
    try:
        numbers = [float(cell) for cell in row]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(COLUMNS) or not all(map(is_number, numbers)):
        raise ValueError(f"Row {place} of the strengths is {list(row)}, expected numbers: {', '.join(COLUMNS)}.")
    return numbers
