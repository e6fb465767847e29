"""The image benchmark: what is compared, and the learning rates that are tried."""

from __future__ import annotations

from typing import Any

from quality.images.runs import image_records
from quality.images.subjects import BACKBONE, SUBJECTS
from quality.jobs import TUNE_DOMAINS, Job, Settings, Suite, rates, with_core

_NARA = with_core((2e-3, 3e-4), (4e-3, 3e-4), (8e-3, 3e-4), (8e-3, 1e-3), (1.6e-2, 3e-4))
_TRIALS: dict[str, tuple[Settings, ...]] = {
    "full": rates(2e-5, 5e-5, 7e-5, 1e-4, 2e-4),
    **dict.fromkeys(("nara", "nara_dora"), _NARA),
    "nara_knots": with_core((2e-3, 1e-3), (4e-3, 1e-3), (8e-3, 1e-3), (8e-3, 3e-3), (1.6e-2, 3e-3)),
    "nara_c": with_core((2e-3, 1e-2), (4e-3, 1e-2), (8e-3, 1e-3), (8e-3, 1e-2), (1.6e-2, 1e-2)),
}
_DEFAULT_TRIALS = rates(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def trials(method: str) -> tuple[Settings, ...]:
    """The settings that tuning tries for `method`."""
    return _TRIALS.get(method, _DEFAULT_TRIALS)


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`, whose backbone is the only one that there is."""
    options = {"stage": job.stage, "control": job.control, "progress": False}
    return image_records(job.domain, job.method, job.seed, **options, **settings)


COMPARED = tuple(name for name in SUBJECTS if name not in TUNE_DOMAINS["images"])
SUITE = Suite("images", (BACKBONE,), COMPARED, trials, run)
