"""The pictures of RESULTS.md: the loss over λ of each method, and its difference to a baseline with 95 % intervals.

Losses differ by orders of magnitude over λ, so differences are drawn in percent of the baseline's loss in that bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from nara_diffusion.utils.files import atomic_write
from quality.report.data import Arm, Grid
from quality.report.tables import LORA, baseline_of, bin_value, noise_levels, ordered, title
from quality.running import is_noise_aware

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
AXIS = "noise level λ (1 = pure noise)"


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        # without the version of matplotlib in it, so that the same figures give the same file
        figure.savefig(partial, dpi=110, metadata={"Software": None})


def loss_figure(grid: Grid, path: Path, name: str) -> None:
    """One column a domain; above the loss over λ of every method, below its difference to LoRA with 95 % intervals."""
    domains = grid.domains
    arms = ordered([arm for arm in grid.arms if arm.control is None])
    figure = Figure(figsize=(1.5 + 3.6 * len(domains), 6.4), layout="constrained")
    axes = figure.subplots(2, len(domains), squeeze=False, sharex=True)
    for column, domain in enumerate(domains):
        above, below = axes[0][column], axes[1][column]
        for arm, style in zip(arms, _styles(arms), strict=True):
            _losses(above, grid, arm, domain, style)
            if arm != LORA:
                _differences(below, grid, arm, LORA, [domain], style)
        above.set(title=domain, yscale="log")
        above.yaxis.set_minor_formatter(NullFormatter())
        _zero(below)
        below.set(xlabel=AXIS)
    axes[0][0].set_ylabel("validation loss")
    axes[1][0].set_ylabel("loss − LoRA's, % of LoRA's")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(name)
    save(figure, path)


def controls_figure(grid: Grid, path: Path, name: str) -> bool:
    """One column a noise-aware method: its and its controls' difference to LoRA or DoRA over λ, mean over domains.

    Returns:
        Whether there was something to draw.
    """
    methods = [arm for arm in ordered(grid.arms) if arm.control is None and is_noise_aware(arm.method)]
    methods = [arm for arm in methods if baseline_of(arm.method) in grid.arms]
    if not methods:
        return False
    figure = Figure(figsize=(1.5 + 4.4 * len(methods), 4.4), layout="constrained")
    row = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for axes, method in zip(row, methods, strict=True):
        arms = [arm for arm in ordered(grid.arms) if arm.method == method.method]
        for arm, style in zip(arms, _styles(arms), strict=True):
            _differences(axes, grid, arm, baseline_of(arm.method), None, style)
        _zero(axes)
        name_of = title(baseline_of(method.method))
        axes.set(xlabel=AXIS, ylabel=f"loss − {name_of}'s, % of {name_of}'s")
        if axes.get_legend_handles_labels()[0]:  # none where no seed has both sides of a difference
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small")
    figure.suptitle(name)
    save(figure, path)
    return True


def _styles(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Methods differ in colour; from the ninth on in the line too."""
    dashes = ("-", "--", ":")
    return [
        {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes[number // len(COLOURS) % len(dashes)]}
        for number in range(len(arms))
    ]


def _losses(axes: Any, grid: Grid, arm: Arm, domain: str, style: dict[str, Any]) -> None:
    """Mean over the seeds."""
    levels = noise_levels(grid)
    by_bin = [grid.spread(arm, bin_value(index), [domain]) for index in range(len(levels))]
    points = [(level, of_bin.mean) for level, of_bin in zip(levels, by_bin, strict=True) if of_bin is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=title(arm), linewidth=1.2, **style)


def _differences(
    axes: Any, grid: Grid, arm: Arm, baseline: Arm, domains: Sequence[str] | None, style: dict[str, Any]
) -> None:
    """Mean and interval over the seeds, in percent of the baseline's mean."""
    levels = noise_levels(grid)
    by_bin = [grid.difference(arm, baseline, bin_value(index), domains) for index in range(len(levels))]
    of = [grid.spread(baseline, bin_value(index), domains) for index in range(len(levels))]
    points = [
        (level, [100 * value / base.mean for value in (of_bin.mean, of_bin.low, of_bin.high)])
        for level, of_bin, base in zip(levels, by_bin, of, strict=True)
        if of_bin is not None and base is not None
    ]
    if points:
        x, (mean, low, high) = [level for level, _ in points], zip(*(values for _, values in points), strict=True)
        axes.plot(x, mean, label=title(arm), linewidth=1.2, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _zero(axes: Any) -> None:
    axes.axhline(0, color="tab:gray", linewidth=0.8)
    axes.set_xlim(0, 1)
