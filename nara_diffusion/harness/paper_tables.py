"""The paper's tables, from what the evaluations of `nara_diffusion.harness.paper` have written so far.

One table a domain: a row a method, a column a test set and their mean, in percent; over several seeds as mean ± sample
standard deviation. MATH, where it was asked, stands beside the mean and not in it. The last column is the difference
to LoRA's mean in percentage points with its 95 % interval (Student's t), paired over the seeds that both have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nara_diffusion.dreambooth.statistics import interval
from nara_diffusion.harness.paper import BASE, DOMAINS, MATH, Plan, Step, result_of
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
        whole = {seed: columns_of(domain, step) for seed, step in steps.items() if step.is_done()}
        if whole:
            found[method] = whole
    return found


def columns_of(domain: str, step: Step) -> dict[str, float]:
    """{column: percent} of an evaluation that is done, with the mean.

    Raises:
        ValueError: a set has no score that is known here.
    """
    results = (result_of(step.folder, step.result) or {})["results"]
    columns = {column: _percent(results[task], task, step) for column, task in DOMAINS[domain].sets.items()}
    further = {"MATH": _percent(results[MATH], MATH, step)} if MATH in step.tasks else {}
    return {**columns, MEAN: fmean(columns.values()), **further}


# What lm-eval calls the score, with the name of the filter that the answers went through.
_METRICS = ("acc,none", "pass@1,program", "math_verify,none")


def _percent(result: Mapping[str, Any], task: str, step: Step) -> float:
    known = [metric for metric in _METRICS if metric in result]
    if not known:
        raise ValueError(f"{step.folder} has no score of {task}, only {', '.join(result)}: delete it to have it redone")
    return 100 * float(result[known[0]])


def table(domain: str, found: Mapping[str, Scores]) -> str:
    """A domain's table in Markdown, and how many seeds it is from."""
    columns = list(dict.fromkeys(column for rows in found.values() for row in rows.values() for column in row))
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
