"""The rows of benchmark_check.py: nara-check's trials and verdict on a regime → a record."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nara_diffusion.check.trials import CheckSettings
from nara_diffusion.check.verdict import decide, mean_losses, relative_difference
from nara_diffusion.utils.statistics import Interval
from quality import results
from quality.images.held_out import BINS
from quality.regimes.check.tasks import check_task
from quality.regimes.runs import REGIMES, Cell, rounded
from quality.regimes.text.denoising import Denoising

ROWS = {
    name: Cell(
        name.partition(":")[0],
        "all" if name.endswith(":all") else "attention",
        *((16, 400) if name == "one_image" else (4, 200)),
    )
    for name in (
        *("eps_to_v", "eps_to_v:all", "eps_to_flow", "zero_snr", "subject", "subject_low", "subject_high"),
        *("two_conditions", "one_image", "blind_open", "blind_determined", "seen_open", "seen_determined"),
    )
}
"""{name: what was checked}, in the table's order; what isn't in `REGIMES` any more has records alone."""
IMAGE_RATES = {"learning_rate": 1e-2, "core_learning_rate": 2.5e-3}
TEXT_RATES = {"learning_rate": 1e-2, "core_learning_rate": 1e-3}


def left_rows(rows: Sequence[str], seeds: Sequence[int], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(row, seed) of which there is no record."""
    done = {(record["row"], record["seed"]) for record in records}
    return [(row, seed) for seed in seeds for row in rows if (row, seed) not in done]


def check_row(row: str, seed: int, settings: CheckSettings | None = None) -> dict[str, Any]:
    """Checks, and says what it found and was made with."""
    wall, core = time.perf_counter(), time.process_time()
    cell = ROWS[row]
    is_text = isinstance(REGIMES[cell.regime], Denoising)
    task = check_task(cell, TEXT_RATES if is_text else IMAGE_RATES, seed)
    settings = settings or CheckSettings(samples=max(CheckSettings().samples, BINS * task.batch_size))
    repeats, verdict = decide(task, settings, progress=True)
    found = {other: _as_dict(relative_difference(repeats, other)) for other in ("lora", "untold")}
    return {
        "row": row,
        "seed": seed,
        "verdict": verdict.answer,
        "reason": verdict.reason,
        "repeats": len(repeats),
        **rounded({"differences": found, "losses": mean_losses(repeats)}),
        "seconds": round(time.perf_counter() - wall, 1),
        "core_seconds": round(time.process_time() - core, 1),
        "date": results.now(),
        "command": shlex.join(["python", *sys.argv]),
        **results.provenance(),
    }


def _as_dict(values: Interval) -> dict[str, float]:
    return {"mean": values.mean, "low": values.low, "high": values.high}
