"""From what the command line asks for to jobs, in the order in which they are worth having."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from quality.jobs import ABLATION_SEEDS, COST, TUNING_SEED, Job
from quality.suites import CONTROLS, Suite
from quality.variants import is_noise_aware


@dataclass(frozen=True)
class Selection:
    """Attributes: what to run of a suite.
    backbones, domains, methods, seeds: of "main"; the others take from them what they need.
    others: methods of the stage "single".
    tune_domains: domains on which learning rates are tried.
    settings: that all runs have.
    """

    backbones: Sequence[str]
    domains: Sequence[str]
    methods: Sequence[str]
    others: Sequence[str]
    tune_domains: Sequence[str]
    seeds: Sequence[int]
    settings: Mapping[str, Any] = field(default_factory=dict)


def jobs_of(suite: Suite, stage: str, selection: Selection) -> list[Job]:
    """The jobs of one stage."""
    stages = {"tune": _tune, "main": _main, "single": _single, "ablation": _ablation, COST: _cost}
    return list(stages[stage](suite, selection))


def _tune(suite: Suite, selection: Selection) -> Iterator[Job]:
    """Every trial of every method, on the seed for tuning."""
    methods = [*selection.methods, *selection.others]
    for backbone, domain, method in product(selection.backbones, selection.tune_domains, methods):
        for trial in suite.trials(method):
            settings = {**selection.settings, **trial}
            yield Job(suite.name, "tune", backbone, domain, method, None, TUNING_SEED, settings)


def _main(suite: Suite, selection: Selection) -> Iterator[Job]:
    """Seed after seed, so that what a stop leaves behind is complete for the seeds that were reached."""
    for seed, backbone, domain in product(selection.seeds, selection.backbones, selection.domains):
        for method in selection.methods:
            controls = CONTROLS if is_noise_aware(method) else ()
            for control in (None, *controls):
                yield Job(suite.name, "main", backbone, domain, method, control, seed, selection.settings)


def _single(suite: Suite, selection: Selection) -> Iterator[Job]:
    seed = min(selection.seeds)
    for backbone, domain, method in product(selection.backbones, selection.domains, selection.others):
        yield Job(suite.name, "single", backbone, domain, method, None, seed, selection.settings)


def _ablation(suite: Suite, selection: Selection) -> Iterator[Job]:
    """Other settings of the chosen methods, on the first backbone and one domain."""
    backbone = selection.backbones[0]
    for seed in sorted(selection.seeds)[:ABLATION_SEEDS]:
        for method, ablation in suite.ablations:
            if method in selection.methods:
                settings = {**selection.settings, **ablation}
                yield Job(suite.name, "ablation", backbone, suite.ablation_domain, method, None, seed, settings)


def _cost(suite: Suite, selection: Selection) -> Iterator[Job]:
    """One run for each method: what a step costs depends on neither domain nor seed."""
    for backbone, method in product(selection.backbones, (*selection.methods, *selection.others)):
        yield Job(suite.name, COST, backbone, selection.domains[0], method, None, 0, selection.settings)
