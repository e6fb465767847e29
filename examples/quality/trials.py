"""How a method's trials of learning rates are written down."""

from __future__ import annotations

from quality.suites import Settings


def rates(*values: float) -> tuple[Settings, ...]:
    """A trial for each rate, of methods without a core."""
    return tuple({"learning_rate": value} for value in values)


def with_core(*pairs: tuple[float, float]) -> tuple[Settings, ...]:
    """A trial for each (rate of A and B, rate of the core)."""
    return tuple({"learning_rate": factors, "core_learning_rate": core} for factors, core in pairs)
