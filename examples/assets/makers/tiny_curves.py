"""A training's curve as a table and as a picture, for the model cards."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure


def write_curve(path: Path, curve: list[dict], columns: tuple[str, ...], label: str) -> None:
    """Writes ``path``.csv with every column, and ``path``.png with the named ones over the steps."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name in columns:
        axes.plot([row["step"] for row in curve], [row[name] for row in curve], label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel=label, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=80)
