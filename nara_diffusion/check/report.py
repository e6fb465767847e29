"""The report of a check: a table to print, check.json with all numbers, check.png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nara_diffusion.training.output.model_card import format_table
from nara_diffusion.training.output.output_dir import write_json
from nara_diffusion.utils.atomic_write import atomic_write
from nara_diffusion.utils.statistics import Interval

from .comparison import ROUNDING, BinLosses, by_bins, mean_losses, relative_difference
from .trial import Repeat
from .verdict import Verdict, described

_TITLES = {"base": "base", "lora": "LoRA", "untold": "without λ", "nara": "NaRA"}


def write_report(folder: Path, repeats: Sequence[Repeat], verdict: Verdict, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write check.json and check.png, and return the content of check.json.

    Args:
        about: further entries of check.json, such as the arguments.
    """
    bins = by_bins(repeats)
    content = {
        **verdict.as_dict(),
        **about,
        "repeats": len(repeats),
        "differences": {other: _known(relative_difference(repeats, other)) for other in ("lora", "untold")},
        "losses": mean_losses(repeats),
        "bins": [row._asdict() | {"difference": _known(row.difference)} for row in bins],
    }
    write_json(folder / "check.json", content)
    draw(folder / "check.png", bins, verdict)
    return content


def summary(repeats: Sequence[Repeat], verdict: Verdict) -> str:
    """The table of losses, with a row for each bin of λ, and the verdict."""
    rows = [_row(f"{row.low:.1f} to {row.high:.1f}", row.losses, row.difference) for row in by_bins(repeats)]
    rows.append(_row("all", mean_losses(repeats), relative_difference(repeats, "lora")))
    return f"{format_table(('λ', *_TITLES.values(), 'NaRA against LoRA'), rows)}\n\n{verdict.answer}: {verdict.reason}"


def _row(name: str, losses: Mapping[str, float], difference: Interval) -> list[str]:
    figures = [f"{losses[arm]:.4g}" if losses[arm] > ROUNDING else "0" for arm in _TITLES]
    return [name, *figures, described(difference)]


def _known(values: Interval) -> dict[str, float | None]:
    """None in place of nan, which JSON lacks."""
    return {name: None if math.isnan(value) else value for name, value in values._asdict().items()}


def draw(path: Path, bins: Sequence[BinLosses], verdict: Verdict) -> None:
    """Write a PNG of the losses over λ, and of NaRA's relative difference from LoRA with its intervals."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(1, 2)
    centres = [(row.low + row.high) / 2 for row in bins]
    for arm, title in _TITLES.items():
        losses.plot(centres, [row.losses[arm] for row in bins], "o-", label=title)
    losses.set(xlabel="noise level λ", ylabel="held-out loss", xlim=(0, 1))
    losses.legend()
    means = [100 * row.difference.mean for row in bins]
    reach = [
        0.0 if math.isnan(row.difference.high) else 100 * row.difference.high - m
        for row, m in zip(bins, means, strict=True)
    ]
    differences.errorbar(centres, means, reach, fmt="o", capsize=4)
    differences.axhline(0, color="gray", linewidth=1)
    differences.set(xlabel="noise level λ", ylabel="NaRA against LoRA, %", xlim=(0, 1))
    figure.suptitle(verdict.answer)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)
