"""Which learning rates a method runs with: those of the trial with the lowest loss, on a seed and questions of its own.

Every method has the same number of trials. A trial's loss is the mean over the domains that it was made on. The trials
of a backbone decide for it; where it has none, those of the other backbones do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quality.jobs import Job

RATES = ("learning_rate", "core_learning_rate")


class Untuned(ValueError):
    """A method has no complete set of trials."""


def tuned(records: Iterable[Mapping[str, Any]], job: Job, trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The trial by whose rates `job` runs.

    Raises:
        Untuned: trials are missing.
    """
    made = [r for r in records if r["stage"] == "tune" and r["suite"] == job.suite and r["method"] == job.method]
    own = [r for r in made if r["backbone"] == job.backbone]
    losses = [_losses(own or made, trial) for trial in trials]
    on = [set(found) for found in losses]
    if not on[0] or any(places != on[0] for places in on):
        missing = sorted({" on ".join(reversed(place)) for places in on for place in set().union(*on) - places})
        raise Untuned(
            f"{job.method} isn't tuned on {job.backbone}, it lacks {', '.join(missing) or 'all trials'}: run --stages "
            "tune with the same file first, or pass --untuned."
        )
    means = [sum(found.values()) / len(found) for found in losses]
    if math.isinf(min(means)):
        raise Untuned(f"every trial of {job.method} on {job.backbone} diverged: give it lower rates")
    return trials[means.index(min(means))]


def _losses(records: Iterable[Mapping[str, Any]], trial: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """{(backbone, domain): loss of `trial`}, infinite where it diverged."""
    found = {}
    for record in records:
        if all(record["trial"].get(name) == value for name, value in trial.items()):
            loss = record["validation_loss"]
            found[record["backbone"], record["domain"]] = math.inf if loss is None else loss
    return found
