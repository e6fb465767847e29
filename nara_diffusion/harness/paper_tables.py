"""The paper's tables, from what the evaluations of `nara_diffusion.harness.paper` have written so far.

One table a domain: a row a method, a column a test set and their mean, in percent; over several seeds as mean ± sample
standard deviation. The last column is the difference to LoRA's mean in percentage points with its 95 % interval
(Student's t), paired over the seeds that both have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nara_diffusion.dreambooth.statistics import interval
from nara_diffusion.harness.paper import BASE, DOMAINS, Plan, result_of
from nara_diffusion.training.methods import METHODS as TITLES

REFERENCE = "lora"
MEAN = "Average"

Scores = dict[int, dict[str, float]]
"""{seed: {column: percent}} of a method."""


def scores(plan: Plan, domain: str, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Scores]:
    """What is there of a domain, by method; `BASE` has one seed."""
    found: dict[str, Scores] = {}
    for method in methods:
        steps = {seed: plan.evaluation_step(domain, method, seed) for seed in seeds}
        results = {seed: result_of(step.folder, step.result) for seed, step in steps.items()}
        whole = {seed: columns_of(domain, result) for seed, result in results.items() if result is not None}
        if whole:
            found[method] = whole
    return found


def columns_of(domain: str, result: Mapping[str, Any]) -> dict[str, float]:
    """{column: percent} of an evaluation, with their mean.

    Raises:
        ValueError: a set is missing from it.
    """
    columns = {}
    for column, task in DOMAINS[domain].sets.items():
        measured = {key: value for key, value in result["results"].get(task, {}).items() if key in _METRICS}
        if not measured:
            raise ValueError(f"the evaluation of {domain} has no score of {task}: delete it to have it done again")
        columns[column] = 100 * next(iter(measured.values()))
    return columns | {MEAN: fmean(columns.values())}


_METRICS = ("acc,none", "pass@1,program")


def table(domain: str, found: Mapping[str, Scores]) -> str:
    """A domain's table in Markdown, and how many seeds it is from."""
    columns = [*DOMAINS[domain].sets, MEAN]
    against = TITLES[REFERENCE].title
    lines = [
        "| method | seeds | " + " | ".join(columns) + f" | against {against} |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for method, by_seed in found.items():
        cells = [_cell([row[column] for row in by_seed.values()]) for column in columns]
        title = "no fine-tuning" if method == BASE else TITLES[method].title
        difference = _difference(by_seed, found.get(REFERENCE, {})) if method not in (BASE, REFERENCE) else ""
        lines.append(f"| {title} | {len(by_seed)} | " + " | ".join(cells) + f" | {difference} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    mean, std, _, _ = interval(values)
    return f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def _difference(ours: Scores, theirs: Scores) -> str:
    """The paired difference of the means over the sets, with its interval where two seeds or more have both."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return ""
    mean, _, low, high = interval([ours[seed][MEAN] - theirs[seed][MEAN] for seed in common])
    return f"{mean:+.2f}" if math.isnan(low) else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
