"""Decide whether λ is likely to help, and with which adapter (README.md has the rules).

    d_k = mean over bins of λ of  (ℓ − ℓ') / max(ℓ, ℓ')        in repeat k

ℓ is the mean loss of one arm on the held-out samples in a bin, and ℓ' is that of another arm. d
lies between −1 and 1, so one failed training doesn't decide the result. The 95 % interval of d uses
Student's t over the repeats.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mean_interval import Interval, interval
from torch import Tensor
from tqdm.auto import tqdm

from nara_diffusion.noise.context import core_holders
from nara_diffusion.training.report import format_table, write_json
from nara_diffusion.training.run import Run

from .repeats import RepeatFile
from .trials import CHEAP, HELD_OUT, NO_CHEAP, TITLES, WAYS, CheckTask, Repeat, trials

BINS = 10  # equal parts of [0, 1], the range of λ
ABOUT = (
    "rank",
    "target_modules",
    "learning_rate",
    "core_learning_rate",
    "seed",
    "train_batch_size",
)
"""Arguments that check.json repeats."""
LIKELY, UNLIKELY, UNKNOWN = "λ is likely to pay", "λ is unlikely to pay", "can't say"
THRESHOLDS = {"pays": 0.02, "nothing": 0.005, "learnt": 0.02, "fewest": 3}
"""
pays     the smallest relative gain of a loss that pays
nothing  the largest mean gain for the verdict UNLIKELY; a larger one may grow with more steps
learnt   the least gain of the lowest loss over the base's; below it the trainings show nothing
fewest   the least number of repeats for a verdict
"""


class Verdict(NamedTuple):
    """The result of the check, whether λ is likely to help and how to give it to an adapter."""

    answer: str  # LIKELY, UNLIKELY or UNKNOWN
    reason: str  # what to do, and the numbers
    way: str | None = None  # the arm to train with λ; None while that isn't clear


def decide(task: CheckTask, progress: bool, file: RepeatFile | None = None) -> tuple[list[Repeat], Verdict]:
    """Repeat the short trainings until the verdict is clear, at most `task.repeats` times.

    Repeats in `file` aren't trained again. New ones are written to it as they finish.
    """
    repeats = [] if file is None else file.read()
    start = len(repeats)
    with tqdm(total=task.repeats, initial=start, unit="repeat", disable=not progress) as bar:
        for repeat in () if is_clear(repeats, task) else trials(task, progress, start):
            repeats.append(repeat)
            if file is not None:
                file.append(repeat)
            bar.update()
            if is_clear(repeats, task):
                break
    return repeats, judge(repeats, task.measured, task.no_cheap)


def is_clear(repeats: Sequence[Repeat], task: CheckTask) -> bool:
    """Return True if more repeats of `task` aren't needed for a verdict."""
    if len(repeats) < THRESHOLDS["fewest"]:
        return False
    verdict = judge(repeats, task.measured, task.no_cheap)
    return verdict.way is not None or verdict.answer == UNLIKELY


def judge(repeats: Sequence[Repeat], measured: str = HELD_OUT, no_cheap: str = NO_CHEAP) -> Verdict:
    """Return the verdict of the first rule that applies.

    `measured` and `no_cheap` are as in `CheckTask`.
    """
    losses = mean_losses(repeats)
    base = losses.pop("base")
    change = min(losses.values()) / base - 1
    if change > -THRESHOLDS["learnt"]:
        remedy = "lower --learning_rate." if change > 0 else "raise --learning_rate."
        learnt = f"the lowest loss is {percent(change)} from the base's"
        return Verdict(UNKNOWN, f"too little was learnt, {learnt}: {remedy}")
    by_arm = differences(repeats)
    answer, advice, way = _decision(by_arm)
    compared = []
    for arm, by_other in by_arm.items():
        for other, difference in by_other.items():
            compared.append(f"{TITLES[arm]} against {TITLES[other]} {described(difference)}")
    reason = f"{advice}. {measured} in {len(repeats)} repeats: {'; '.join(compared)}."
    if not set(WAYS) & set(by_arm):
        reason += f" No cheap way to give the model λ was tried: {no_cheap}."
    return Verdict(answer, reason, way)


def _decision(found: dict[str, dict[str, Interval]]) -> tuple[str, str, str | None]:
    """Return answer, advice and way of the first rule that applies to the differences."""
    lora, untold = found["nara"]["lora"], found["nara"]["untold"]
    cheap = next((arm for arm in WAYS if arm in found), None)
    name = TITLES[cheap] if cheap else ""
    gains = cheap is not None and is_below(found[cheap]["lora"])
    if is_below(lora) and is_below(untold):
        return _way_that_pays(found, cheap, gains)
    take = "take LoRA"
    if gains:
        take = f"take a larger LoRA ({name} is better, by its size if not by λ)"
    needed = percent(-THRESHOLDS["pays"])
    if lora.high < 0 and untold.high < 0:
        advice = f"{take}, or train both, since a gain may grow"
        return UNKNOWN, f"NaRA is better, but not by {needed}: {advice}", None
    if _excludes_a_gain(lora) or _excludes_a_gain(untold):
        return UNLIKELY, take, None
    if max(lora.mean, untold.mean) >= 0:
        other = TITLES["lora" if lora.mean >= 0 else "untold"]
        return UNKNOWN, f"NaRA isn't better than {other} in the mean: {take}", None
    if max(lora.low, untold.low) > -THRESHOLDS["pays"]:
        return UNKNOWN, f"an interval excludes {needed}, but not a smaller gain: {take}", None
    advice = f"{take}, or raise --train_batch_size"
    return UNKNOWN, f"the intervals allow both {needed} and no gain: {advice}", None


def _way_that_pays(
    found: dict[str, dict[str, Interval]], cheap: str | None, gains: bool
) -> tuple[str, str, str | None]:
    """Return answer, advice and way if λ pays in NaRA; `gains`: the cheap way beats LoRA."""
    if cheap is None:
        return LIKELY, "take NaRA", "nara"
    name = TITLES[cheap]
    if is_below(found["nara"][cheap]):
        return LIKELY, f"take NaRA, which is better than {name} too", "nara"
    if gains:
        return LIKELY, f"the cheapest way that gets it is {name}", cheap
    return LIKELY, f"NaRA gets it; whether {name} does isn't clear: try that first", None


def _excludes_a_gain(difference: Interval) -> bool:
    """Return True if no gain is to be expected.

    Then the interval reaches zero and excludes a gain that pays, and the mean shows no gain that
    may grow with more steps.
    """
    excludes = difference.low > -THRESHOLDS["pays"] and difference.high >= 0
    return excludes and difference.mean > -THRESHOLDS["nothing"]


def is_below(difference: Interval) -> bool:
    """Return whether a loss is lower, with an interval below zero and a mean gain that pays."""
    return difference.high < 0 and difference.mean <= -THRESHOLDS["pays"]


def differences(repeats: Sequence[Repeat]) -> dict[str, dict[str, Interval]]:
    """Return {arm: {other: d}} for NaRA against all others, and for the cheap way against LoRA."""
    means = bin_means(repeats)
    cheap = [arm for arm in WAYS if arm in means]
    pairs = {"nara": ["lora", "untold", *cheap]}
    for arm in cheap:
        pairs[arm] = ["lora"]
    by_arm: dict[str, dict[str, Interval]] = {}
    for arm, by_other in pairs.items():
        by_arm[arm] = {other: relative_difference(means[arm], means[other]) for other in by_other}
    return by_arm


def relative_difference(means: Tensor, others: Tensor) -> Interval:
    """Return the mean and interval of d from the mean losses (repeats, BINS) of two arms.

    In bins with means that are only rounding errors, d is 0.
    """
    larger = torch.maximum(means, others)
    relative = ((means - others) / larger).masked_fill(larger <= 1e-10, 0.0)
    return interval(relative.nanmean(1).tolist())


def mean_losses(repeats: Sequence[Repeat]) -> dict[str, float]:
    """Return {arm: its loss} over all held-out samples."""
    means = {}
    for arm in repeats[0].losses:
        losses = torch.cat([repeat.losses[arm] for repeat in repeats])
        means[arm] = losses.mean().item()
    return means


def bin_means(repeats: Sequence[Repeat]) -> dict[str, Tensor]:
    """Return {arm: mean losses (repeats, BINS)}; NaN in bins without samples."""
    levels = torch.stack([repeat.noise_level for repeat in repeats])  # (repeats, n)
    numbers = (levels * BINS).long().clamp(0, BINS - 1)
    inside = (numbers[:, None] == torch.arange(BINS)[:, None]).double()  # (repeats, BINS, n)
    means = {}
    for arm in repeats[0].losses:
        losses = torch.stack([repeat.losses[arm].double() for repeat in repeats])
        means[arm] = (inside * losses[:, None]).sum(2) / inside.sum(2)
    return means


def percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def described(difference: Interval) -> str:
    """Return a relative difference and its 95 % interval as text."""
    return f"{percent(difference.mean)} ({percent(difference.low)} to {percent(difference.high)})"


def check_training(task: CheckTask, run: Run) -> dict[str, Any]:
    """Repeat the short trainings of a run until the verdict is clear.

    Print the verdict, write check.json into the run's folder, and return its content. Each repeat
    is written as it finishes, so that the same command continues a check that was stopped.
    """
    if run.accelerator.num_processes > 1:
        raise ValueError(f"nara_check runs in one process, got {run.accelerator.num_processes}: start it with python.")
    run.open({"check": task.measured})
    repeats, verdict = decide(task, run.is_main, RepeatFile(run.folder / "repeats.jsonl", run.digests))
    compared: dict[str, dict[str, Any]] = {}
    for arm, by_other in differences(repeats).items():
        compared[arm] = {other: interval_of._asdict() for other, interval_of in by_other.items()}
    cheap = core_holders(task.model)[0].configs.get(CHEAP)
    losses = _losses_over_level(repeats)
    content = {
        "verdict": verdict.answer,
        "reason": verdict.reason,
        "way": verdict.way,
        "model": run.args.pretrained_model_name_or_path,
        **{name: getattr(run.args, name) for name in ABOUT},
        "cheap_rank": getattr(cheap, "r", None),
        "measured": task.measured,
        "repeats": len(repeats),
        "differences": compared,
        "losses": losses,
    }
    path = run.folder / "check.json"
    write_json(path, content)
    cells = []
    for row, means in losses.items():
        cells.append([row, *(f"{loss:.4g}" for loss in means.values())])
    titles = [TITLES[arm] for arm in losses["all"]]
    table = format_table(("λ", *titles), cells)
    result = f"{verdict.answer}: {verdict.reason}"
    sys.stdout.write(f"{task.measured}:\n{table}\n\n{result}\nall numbers are in {path}\n")
    return content


def _losses_over_level(repeats: Sequence[Repeat]) -> dict[str, dict[str, float]]:
    """Return {range of λ: {arm: mean loss}} of bins that have samples, and "all"."""
    means = {arm: table.nanmean(0) for arm, table in bin_means(repeats).items()}
    losses: dict[str, dict[str, float]] = {}
    for number in range(BINS):
        if not means["base"][number].isnan():
            row = f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}"
            losses[row] = {arm: mean[number].item() for arm, mean in means.items()}
    return losses | {"all": mean_losses(repeats)}
