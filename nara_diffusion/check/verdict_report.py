"""Run a check and write its report: a table to print, check.json with all numbers, check.png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nara_diffusion.training.report import format_table, write_json
from nara_diffusion.training.run import Run
from nara_diffusion.utils.atomic_write import atomic_write
from nara_diffusion.utils.statistics import Interval

from .trials import CheckSettings, CheckTask, Repeat
from .verdict import BinLosses, Verdict, by_bins, decide, described, mean_losses, relative_difference

_TITLES = {"base": "base", "lora": "LoRA", "untold": "without λ", "nara": "NaRA"}


def check_training(task: CheckTask, args: Any, run: Run) -> tuple[dict[str, Any], str]:
    """Check the training of a train script, in the folder of its run. Returns what `run_check` returns.

    Raises:
        ValueError: there are several processes; see `trials`.
    """
    if run.accelerator.num_processes > 1:
        raise ValueError(
            f"--check runs in one process, got {run.accelerator.num_processes}: start it by python, not accelerate "
            "launch."
        )
    names = ("rank", "target_modules", "learning_rate", "core_learning_rate", "seed")
    about = {"model": args.pretrained_model_name_or_path, **{name: getattr(args, name) for name in names}}
    return run_check(task, CheckSettings(), run.folder, about, run.is_main)


def run_check(
    task: CheckTask, settings: CheckSettings, folder: Path, about: Mapping[str, Any], progress: bool
) -> tuple[dict[str, Any], str]:
    """Repeat the short trainings until the verdict is clear, and write check.json and check.png to `folder`.

    Args:
        about: further entries of check.json, such as the arguments.
        progress: whether to show progress bars.

    Returns:
        The content of check.json, and the text to show.

    Raises:
        ValueError: see `trials`.
    """
    repeats, verdict = decide(task, settings, progress)
    bins = by_bins(repeats)
    content = {
        **verdict.as_dict(),
        **about,
        "settings": asdict(settings),
        "repeats": len(repeats),
        "differences": {other: _known(relative_difference(repeats, other)) for other in ("lora", "untold")},
        "losses": mean_losses(repeats),
        "bins": [row._asdict() | {"difference": _known(row.difference)} for row in bins],
    }
    write_json(folder / "check.json", content)
    draw(folder / "check.png", bins, verdict)
    files = f"all numbers are in {folder / 'check.json'}, drawn in {folder / 'check.png'}"
    return content, f"{summary(repeats, verdict)}\n{files}"


def summary(repeats: Sequence[Repeat], verdict: Verdict) -> str:
    """The table of losses, with a row for each bin of λ, and the verdict."""
    rows = [_row(f"{row.low:.1f} to {row.high:.1f}", row.losses, row.difference) for row in by_bins(repeats)]
    rows.append(_row("all", mean_losses(repeats), relative_difference(repeats, "lora")))
    return f"{format_table(('λ', *_TITLES.values(), 'NaRA against LoRA'), rows)}\n\n{verdict.answer}: {verdict.reason}"


def _row(name: str, losses: Mapping[str, float], difference: Interval) -> list[str]:
    return [name, *(f"{losses[arm]:.4g}" for arm in _TITLES), described(difference)]


def _known(values: Interval) -> dict[str, float | None]:
    """None in place of nan, which JSON lacks."""
    return {name: None if math.isnan(value) else value for name, value in values._asdict().items()}


def draw(path: Path, bins: Sequence[BinLosses], verdict: Verdict) -> None:
    """Write a PNG of the losses over λ, and of NaRA's relative difference from LoRA with its intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    centres = [(row.low + row.high) / 2 for row in bins]
    for arm, title in _TITLES.items():
        losses.plot(centres, [row.losses[arm] for row in bins], "o-", label=title)
    losses.set(xlabel="noise level λ", ylabel="held-out loss", xlim=(0, 1))
    losses.legend()
    means = [100 * row.difference.mean for row in bins]
    reach = [100 * (row.difference.high - row.difference.mean) for row in bins]
    differences.errorbar(centres, means, [0 if math.isnan(each) else each for each in reach], fmt="o", capsize=4)
    differences.axhline(0, color="gray", linewidth=1)
    differences.set(xlabel="noise level λ", ylabel="NaRA against LoRA, %", xlim=(0, 1))
    figure.suptitle(verdict.answer)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)
