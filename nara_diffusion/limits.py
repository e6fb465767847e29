"""How large the numbers of a configuration may be."""

from __future__ import annotations

from numbers import Real
from typing import Any

LARGEST_NUMBER = 1e9
"""The largest scale: α and η multiply each other, and norms square the product, which is still a float32."""

SMALLEST_SCALE = 1e-9
"""Below it, η F(e(λ)) vanishes beside the I that it is added to."""


def is_number(value: Any) -> bool:
    """Whether `value` is a real number, no bool, that float32 can reckon with; NaN and infinity are not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return bool(-LARGEST_NUMBER <= value <= LARGEST_NUMBER)  # type: ignore[operator]
