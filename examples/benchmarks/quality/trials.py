"""How trials of learning rates, and ablations, are written down."""

from __future__ import annotations

from quality.suites import Settings


def rates(*values: float) -> tuple[Settings, ...]:
    """A trial for each rate, of methods without a core."""
    return tuple({"learning_rate": value} for value in values)


def with_core(*pairs: tuple[float, float]) -> tuple[Settings, ...]:
    """A trial for each (rate of A and B, rate of the core)."""
    return tuple({"learning_rate": factors, "core_learning_rate": core} for factors, core in pairs)


def beside(method: str, *settings: Settings) -> tuple[tuple[str, Settings], ...]:
    """Ablations of `method`, each with other settings than its own."""
    return tuple((method, each) for each in settings)
