"""Does jobs one after another and writes down what came out. A job that is in the results file isn't done again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from quality import results
from quality.jobs import COST, Job, finished
from quality.suites import Settings, Suite
from quality.tuning import RATES, tuned
from quality.variants import resolve

logger = logging.getLogger(__name__)


def run_jobs(suite: Suite, jobs: Sequence[Job], path: Path, *, untuned: bool = False) -> list[str]:
    """Runs those of `jobs`, all of one stage, that `path` doesn't hold; returns what failed, a line each.

    Args:
        untuned: take each method's first trial, whatever the trials in `path` say.

    Raises:
        ValueError: a method isn't tuned, or was run with other rates before.
    """
    records = results.read(path)
    done = finished(records)
    rates = {job.key: _rates(suite, job, records, untuned) for job in jobs}
    check_same_rates(records, jobs, rates)
    failures = []
    left = [job for job in jobs if job.key not in done]
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="run") as bar:
        for job in left:
            bar.set_description(job.title)
            try:
                results.append(path, complete(job, run(suite, job, rates[job.key])))
            except ArithmeticError as error:
                if job.stage == "tune":
                    results.append(path, complete(job, [_diverged(job)]))
                else:
                    failures.append(f"{job.title}: {error}")
                    logger.warning(failures[-1])
            bar.update()
    return failures


def run(suite: Suite, job: Job, rates: Settings) -> list[dict[str, Any]]:
    """The records of one job, under the name by which it was asked for."""
    method, extra = resolve(job.method)
    records = suite.run(dataclasses.replace(job, method=method), {**extra, **rates, **job.settings})
    return [record | {"method": job.method} for record in records]


def complete(job: Job, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`records` with what is needed to repeat them, and to know that the job is done."""
    trial = {name: job.settings[name] for name in RATES if name in job.settings}
    common = {"trial": trial, **results.provenance(), "date": results.now(), "job": job.key}
    last = len(records) - 1
    return [{**record, **common, "last": index == last} for index, record in enumerate(records)]


def check_same_rates(records: Sequence[Mapping[str, Any]], jobs: Sequence[Job], rates: Mapping[str, Settings]) -> None:
    """Refuses to mix runs of different rates: they would be compared as if they had one.

    Raises:
        ValueError: a job of these is done, and with other rates than it has now.
    """
    for record in records:
        now = rates.get(record["job"], {})
        was = {name: record[name] for name in now}
        if was != now:
            raise ValueError(
                f"{record['stage']} {record['backbone']} {record['domain']} {record['method']} was run with {was}, but "
                f"tuning now says {dict(now)}: take its lines out, or write to another --output."
            )


def _rates(suite: Suite, job: Job, records: Sequence[Mapping[str, Any]], untuned: bool) -> Settings:
    """The learning rates that a job gets from tuning; a trial, or settings that name them, get none."""
    if job.stage == "tune" or any(name in job.settings for name in RATES):
        return {}
    trials = suite.trials(job.method)
    return trials[0] if untuned or job.stage == COST else tuned(records, job, trials)


def _diverged(job: Job) -> dict[str, Any]:
    """The record of a trial without an end."""
    named = {key: value for key, value in dataclasses.asdict(job).items() if key != "settings"}
    return {**named, "settings": dict(job.settings), "noise_levels": None, "losses": None, "validation_loss": None}
