"""The paper's tables, from all results that the evaluations of `nara_diffusion.harness.paper.plan` have written so far.

There is a table for each domain, in percent, with a row for each method and a column for each test set and for their
mean. Several seeds are given as mean ± sample standard deviation. MATH has a column, but is not part of the mean. The
last column is the difference from LoRA's mean in percentage points with its 95 % interval (Student's t), paired over
the seeds that both have.

The settings of all runs stand before the tables. If an evaluation was limited to fewer questions, its table says so.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nara_diffusion.training.adapters.methods import METHODS as TITLES
from nara_diffusion.utils.statistics import interval

from .plan import BASE, DOMAINS, MATH, Plan, Run
from .settings import recorded, separated

REFERENCE = "lora"
MEAN = "Average"

Results = Mapping[Run, Mapping[str, Any]]
"""{run: nara-eval's results} of a domain."""
Scores = dict[int, dict[str, float]]
"""{seed: {column: percent}} of a method, column by column."""


def document(plan: Plan) -> str:
    """The tables of all results in the output folder, in Markdown.

    Raises:
        ValueError: a set has no known score, or a run has no settings file.
    """
    found = {domain: results for domain in DOMAINS if (results := results_of(plan, domain))}
    parts = ["# Tables of arXiv 2605.29716, run again", *made_with(plan, list(found))]
    parts.append("In percent; mean ± standard deviation over seeds.")
    for domain, results in found.items():
        parts += [f"## {domain}", *_limits(domain, results), *_method_arguments(plan, results)]
        parts.append(table(domain, scores(plan, domain, results)))
    return "\n\n".join(parts) + "\n"


def results_of(plan: Plan, domain: str) -> dict[Run, dict[str, Any]]:
    """The results of the evaluated runs, in the order of the rows; the base stands once, whatever its seed."""
    runs = [run for run in plan.runs() if run[0] == domain and (run[1] != BASE or run == plan.base_run(domain, run[2]))]
    return {run: results for run in runs if (results := plan.evaluated(*run)) is not None}


def made_with(plan: Plan, domains: Sequence[str]) -> list[str]:
    """The settings that all runs share, in Markdown."""
    models = dict.fromkeys(plan.pretrained_and_revision(domain) for domain in domains)
    names = [f"`{name}`" + (f", revision `{revision}`" if revision else "") for name, revision in models]
    lines = (
        [f"Model: {' and '.join(names)} (configurations `{plan.model}`), evaluated in {plan.dtype}."] if names else []
    )
    for what, words in (("evaluation", plan.evaluation), ("training", plan.training)):
        lines += [f"Further arguments of {what}: `{shlex.join(separated(words))}`"] if words else []
    return lines


def _method_arguments(plan: Plan, results: Results) -> list[str]:
    given = {method: recorded(plan.folder(*run)).get("method_arguments") for run in results for method in [run[1]]}
    return [
        f"Further arguments of training {_title(name)}: `{shlex.join(words)}`" for name, words in given.items() if words
    ]


def _limits(domain: str, results: Results) -> list[str]:
    """A line with the number of questions, if not all of them were asked."""
    columns = {task: column for column, task in {**DOMAINS[domain].sets, "MATH": MATH}.items()}
    asked = [(columns[task], n) for found in results.values() for task, n in found.get("n-samples", {}).items()]
    short = dict.fromkeys(
        f"{n['effective']} of {n['original']} questions of {column}"
        for column, n in asked
        if n["effective"] < n["original"]
    )
    return [f"**Not the paper's figures: asked were only {', '.join(short)}.**"] if short else []


def scores(plan: Plan, domain: str, results: Results) -> dict[str, Scores]:
    """The scores of each method: {method: {seed: {column: percent}}}."""
    found: dict[str, Scores] = {}
    for run, result in results.items():
        found.setdefault(run[1], {})[run[2]] = columns_of(domain, result["results"], str(plan.folder(*run)))
    return found


def columns_of(domain: str, results: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, float]:
    """{column: percent} of a run, with the mean.

    Raises:
        ValueError: a set has no known score.
    """
    columns = {column: _percent(results[task], task, where) for column, task in DOMAINS[domain].sets.items()}
    further = {"MATH": _percent(results[MATH], MATH, where)} if MATH in results else {}
    return {**columns, MEAN: fmean(columns.values()), **further}


# What lm-eval calls the score, with the name of the filter that the answers went through.
_METRICS = ("acc,none", "pass@1,program", "math_verify,none")


def _percent(result: Mapping[str, Any], task: str, where: str) -> float:
    known = [metric for metric in _METRICS if metric in result]
    if not known:
        raise ValueError(f"{where} has no score of {task}, only {', '.join(result)}: delete it to repeat the run")
    return 100 * float(result[known[0]])


def table(domain: str, found: Mapping[str, Scores]) -> str:
    """The table of a domain in Markdown, with the number of its seeds."""
    columns = list(dict.fromkeys(column for rows in found.values() for row in rows.values() for column in row))
    against = TITLES[REFERENCE].title
    lines = [
        "| method | seeds | " + " | ".join(columns) + f" | against {against} |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for method, by_seed in found.items():
        cells = [_cell([row[name] for row in by_seed.values() if name in row], len(by_seed)) for name in columns]
        difference = _difference(by_seed, found.get(REFERENCE, {})) if method not in (BASE, REFERENCE) else ""
        lines.append(f"| {_title(method)} | {len(by_seed)} | " + " | ".join(cells) + f" | {difference} |")
    return "\n".join(lines)


def _title(method: str) -> str:
    return "no fine-tuning" if method == BASE else TITLES[method].title


def _cell(values: Sequence[float], seeds: int) -> str:
    """The mean and standard deviation of the values, with their number if it isn't that of the seeds."""
    if not values:
        return ""
    mean, std, _, _ = interval(values)
    part = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else ""
    return (f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}") + part


def _difference(ours: Scores, theirs: Scores) -> str:
    """The paired difference of the means over the sets, with its 95 % interval from two common seeds on."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return ""
    mean, _, low, high = interval([ours[seed][MEAN] - theirs[seed][MEAN] for seed in common])
    return f"{mean:+.2f}" if math.isnan(low) else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
