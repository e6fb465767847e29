"""A check from its task to its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nara_diffusion.check.measurement import CheckSettings, CheckTask, measure
from nara_diffusion.check.report import summary, write_report
from nara_diffusion.check.verdict import judge
from nara_diffusion.training.run import Run


def run_check(
    task: CheckTask, settings: CheckSettings, folder: Path, about: dict[str, Any], progress: bool
) -> tuple[dict[str, Any], str]:
    """Measures, and writes check.json and check.png into `folder`: (what check.json holds, what to show).

    Raises:
        ValueError: see `measure`.
    """
    findings = measure(task, settings, progress)
    verdict = judge(findings)
    content = write_report(folder, findings, verdict, about | {"settings": dataclasses.asdict(settings)})
    files = f"all numbers are in {folder / 'check.json'}, drawn in {folder / 'check.png'}"
    return content, f"{summary(findings, verdict)}\n{files}"


def check_training(task: CheckTask, args: Any, run: Run) -> tuple[dict[str, Any], str]:
    """The check of a train script: by its own learning rate, in its folder; returns as `run_check`.

    Raises:
        ValueError: there are several processes; see `measure`.
    """
    if run.accelerator.num_processes > 1:
        raise ValueError(f"check runs on one process, got {run.accelerator.num_processes}: start it by python alone.")
    settings = CheckSettings(learning_rate=args.learning_rate)
    about = {"model": args.pretrained_model_name_or_path, "rank": args.rank, "target_modules": args.target_modules}
    return run_check(task, settings, run.folder, {**about, "seed": args.seed}, run.is_main)
