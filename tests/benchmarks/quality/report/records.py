"""Made-up results for the tests of the report: figures that a reader can check by hand."""

from __future__ import annotations

from typing import Any

LEVELS = [0.25, 0.75]


def record(method: str, seed: int, losses: list[float], **fields: Any) -> dict[str, Any]:
    """One record, of the text suite's main stage unless `fields` say otherwise."""
    common = {"suite": "text", "stage": "main", "backbone": "tiny", "domain": "code", "control": None}
    settings = {"learning_rate": 0.01, "core_learning_rate": None, "rank": 4, "steps": 300, "settings": {}}
    cost = {"trainable_parameters": 1000, "step_ms": 40.0, "peak_memory_mib": 10.0, "seconds": 36.0}
    figures = {"noise_levels": LEVELS, "losses": losses, "loss_errors": [0.03, 0.04]}
    mean = {"validation_loss": sum(losses) / len(losses), "validation_error": 0.025}
    return {**common, **settings, **cost, **figures, **mean, "method": method, "seed": seed, **fields}


def runs(method: str, losses: list[float], **fields: Any) -> list[dict[str, Any]]:
    """Seeds 0, 1, … with these losses, the same in both bins."""
    return [record(method, seed, [loss, loss], **fields) for seed, loss in enumerate(losses)]


def cells(text: str) -> dict[str, list[str]]:
    """A Markdown table: {first cell of a row: the others}."""
    rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("---")}
