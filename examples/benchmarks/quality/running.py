"""Does jobs one after another and writes down what came out. A job that is in the results file isn't done again.

A method runs with the learning rates of the trial with the lowest loss, on a seed and questions of its own.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from quality import results
from quality.jobs import Job, Settings, Suite

logger = logging.getLogger(__name__)
RATES = ("learning_rate", "core_learning_rate")
Record = Mapping[str, Any]


class Untuned(ValueError):
    """A method has no complete set of trials."""


def left_of(jobs: Sequence[Job], path: Path) -> list[Job]:
    """Those of `jobs` whose last record isn't in the file."""
    done = {record["job"] for record in results.read(path) if record.get("last")}
    return [job for job in jobs if job.key not in done]


def run_jobs(suite: Suite, jobs: Sequence[Job], path: Path, *, untuned: bool = False) -> list[str]:
    """Runs those of `jobs`, all of one stage, that `path` doesn't hold; returns what failed, a line each.

    Args:
        untuned: take each method's first trial, whatever the trials in `path` say.

    Raises:
        Untuned: a method isn't tuned.
    """
    records, failures = results.read(path), []
    with tqdm([(job, _rates(suite, job, records, untuned)) for job in left_of(jobs, path)], unit="run") as bar:
        for job, rates in bar:
            bar.set_description(job.title)
            try:
                results.append(path, complete(job, suite.run(job, {**rates, **job.settings})))
            except ArithmeticError as error:
                if job.stage == "tune":
                    results.append(path, complete(job, [_diverged(job)]))
                else:
                    failures.append(f"{job.title}: {error}")
                    logger.warning(failures[-1])
    return failures


def complete(job: Job, records: Sequence[Record]) -> list[dict[str, Any]]:
    """`records` with what is needed to repeat them, and to know that the job is done."""
    trial = {name: job.settings[name] for name in RATES if name in job.settings}
    common = {"trial": trial, **results.provenance(), "date": results.now(), "job": job.key}
    last = len(records) - 1
    return [{**record, **common, "last": index == last} for index, record in enumerate(records)]


def _rates(suite: Suite, job: Job, records: Sequence[Record], untuned: bool) -> Settings:
    """The learning rates that a job gets from tuning; a trial, or settings that name them, get none."""
    if job.stage == "tune" or any(name in job.settings for name in RATES):
        return {}
    trials = suite.trials(job.method)
    if untuned:
        return trials[0]
    made = [r for r in records if r["stage"] == "tune" and (r["suite"], r["method"]) == (job.suite, job.method)]
    made = [r for r in made if r["backbone"] == job.backbone] or made
    losses = [[_loss(r) for r in made if r["trial"] == trial] for trial in trials]
    if not all(losses):
        raise Untuned(f"{job.method} isn't tuned on {job.backbone}: run --stages tune first, or pass --untuned.")
    means = [fmean(each) for each in losses]
    if math.isinf(min(means)):
        raise Untuned(f"every trial of {job.method} on {job.backbone} diverged: give it lower rates.")
    return trials[means.index(min(means))]


def _loss(record: Record) -> float:
    return math.inf if record["validation_loss"] is None else record["validation_loss"]


def _diverged(job: Job) -> dict[str, Any]:
    """The record of a trial without an end."""
    named = {key: value for key, value in dataclasses.asdict(job).items() if key != "settings"}
    return {**named, "settings": dict(job.settings), "noise_levels": None, "losses": None, "validation_loss": None}
