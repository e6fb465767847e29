"""Running a check: from a task to its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nara_diffusion.training.run import Run

from .report import summary, write_report
from .trial import CheckSettings, CheckTask, Repeat, trials
from .verdict import THRESHOLDS, UNKNOWN, Verdict, after_steps, judge


def run_check(
    task: CheckTask, settings: CheckSettings, folder: Path, about: dict[str, Any], progress: bool
) -> tuple[dict[str, Any], str]:
    """Repeat the short trainings until the verdict is clear, and write check.json and check.png to `folder`.

    Args:
        about: further entries of check.json. progress: whether to show progress bars.

    Returns:
        The content of check.json, and the text to show.

    Raises:
        ValueError: see `trials`.
    """
    repeats, verdict = decide(task, settings, progress)
    verdict = after_steps(verdict, settings.steps)
    content = write_report(folder, repeats, verdict, about | {"settings": dataclasses.asdict(settings)})
    files = f"all numbers are in {folder / 'check.json'}, drawn in {folder / 'check.png'}"
    return content, f"{summary(repeats, verdict)}\n{files}"


def decide(task: CheckTask, settings: CheckSettings, progress: bool) -> tuple[list[Repeat], Verdict]:
    """Repeat the short trainings until the verdict is clear, or `settings.repeats` times.

    Raises:
        ValueError: see `trials`.
    """
    repeats: list[Repeat] = []
    for repeat in trials(task, settings, progress):
        repeats.append(repeat)
        if len(repeats) >= THRESHOLDS.fewest and (verdict := judge(repeats)).answer != UNKNOWN:
            return repeats, verdict
    return repeats, judge(repeats)


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
    about = {"model": args.pretrained_model_name_or_path, "rank": args.rank, "target_modules": args.target_modules}
    rates = {"learning_rate": args.learning_rate, "core_learning_rate": args.core_learning_rate}
    return run_check(task, CheckSettings(), run.folder, {**about, **rates, "seed": args.seed}, run.is_main)
