"""Is λ likely to pay, and which way of telling it? Differences of held-out losses, rules (docs/check.md), a report.

    d_k = mean over bins of λ of  (ℓ − ℓ') / max(ℓ, ℓ')        in repeat k

ℓ is an arm's mean loss on the held-out samples in a bin, ℓ' another's. d lies between −1 and 1, so that one training
that fails doesn't decide the result. Its 95 % interval is Student's t over the repeats.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nara_diffusion.noise.level import core_holders
from nara_diffusion.training.report import format_table, write_json
from nara_diffusion.training.run import Run
from nara_diffusion.utils.statistics import Interval, interval

from .trials import CHEAP, HELD_OUT, NO_CHEAP, TITLES, WAYS, CheckTask, Repeat, trials

BINS = 10  # equal parts of [0, 1], where λ is
ABOUT = "rank target_modules learning_rate core_learning_rate seed train_batch_size"  # arguments in check.json
LIKELY, UNLIKELY, UNKNOWN = "λ is likely to pay", "λ is unlikely to pay", "can't say"
THRESHOLDS = {"pays": 0.02, "nothing": 0.005, "learnt": 0.02, "fewest": 3}
"""The relative gain of a loss from which on it pays; the largest mean gain at which λ is said not to pay, since a
larger one may grow with more steps; the gain of the lowest loss over the base's without which the trainings show
nothing; and the least number of repeats for a verdict."""


class Verdict(NamedTuple):
    """LIKELY, UNLIKELY or UNKNOWN; what to do, and the numbers; the arm that tells λ, None while that isn't clear."""

    answer: str
    reason: str
    way: str | None = None


def decide(task: CheckTask, progress: bool) -> tuple[list[Repeat], Verdict]:
    """Repeat the short trainings until the verdict is clear, or `task.repeats` times."""
    repeats: list[Repeat] = []
    started = time.perf_counter()
    for repeat in trials(task, progress):
        repeats.append(repeat)
        if len(repeats) == 1 and progress:
            tqdm.write(time_left(time.perf_counter() - started, task.repeats))
        found = judge(repeats, task.measured, task.no_cheap)
        if len(repeats) >= THRESHOLDS["fewest"] and (found.way or found.answer == UNLIKELY):
            break
    return repeats, judge(repeats, task.measured, task.no_cheap)


def time_left(seconds: float, repeats: int) -> str:
    """What the first of at most `repeats` repeats, which took `seconds`, says of the others."""
    least, most = (f"{(count - 1) * seconds:.0f} s" for count in (THRESHOLDS["fewest"], repeats))
    return f"the first repeat took {seconds:.0f} s: the verdict comes in {least} at least, {most} at most."


def judge(repeats: Sequence[Repeat], measured: str = HELD_OUT, no_cheap: str = NO_CHEAP) -> Verdict:
    """The verdict of the first rule that applies; `measured` and `no_cheap` as in `CheckTask`."""
    losses, found = mean_losses(repeats), differences(repeats)
    change = min(loss for arm, loss in losses.items() if arm != "base") / losses["base"] - 1
    if change > -THRESHOLDS["learnt"]:
        remedy = "lower --learning_rate." if change > 0 else "raise --learning_rate."
        return Verdict(
            UNKNOWN,
            f"too little was learnt, the lowest loss is {percent(change)} from the base's: {remedy}",
        )
    answer, advice, way = _decision(found)
    each = (
        f"{TITLES[a]} against {TITLES[b]} {described(d)}"
        for a in found
        for b, d in found[a].items()
    )
    numbers = f"{measured} in {len(repeats)} repeats: {'; '.join(each)}."
    untried = "" if {*WAYS} & {*found} else f" No cheap way of telling λ was tried: {no_cheap}."
    return Verdict(answer, f"{advice}. {numbers}{untried}", way)


def _decision(found: dict[str, dict[str, Interval]]) -> tuple[str, str, str | None]:
    """Answer, advice and way of the first rule that applies to the differences."""
    cheap = next((arm for arm in WAYS if arm in found), "")
    both = lora, untold = found["nara"]["lora"], found["nara"]["untold"]
    pays, gains = (
        is_below(lora) and is_below(untold),
        bool(cheap) and is_below(found[cheap]["lora"]),
    )
    name, needed = TITLES.get(cheap), percent(-THRESHOLDS["pays"])
    if pays and (not cheap or is_below(found["nara"][cheap])):
        return (
            LIKELY,
            f"take NaRA, which is better than {name} too" if cheap else "take NaRA",
            "nara",
        )
    if pays and gains:
        return LIKELY, f"the cheapest way that gets it is {name}", cheap
    if pays:
        return LIKELY, f"NaRA gets it; whether {name} does isn't clear: try that first", None
    take = (
        f"take a larger LoRA ({name} is better, by its size if not by λ)" if gains else "take LoRA"
    )
    if lora.high < 0 and untold.high < 0:
        return (
            UNKNOWN,
            f"NaRA is better, but not by {needed}: {take}, or train both, since a gain may grow",
            None,
        )
    # an interval that excludes a gain that pays and includes none, whose mean shows no gain that may grow
    if any(
        d.low > -THRESHOLDS["pays"] and d.mean > -THRESHOLDS["nothing"] and d.high >= 0
        for d in both
    ):
        return UNLIKELY, take, None
    if max(lora.mean, untold.mean) >= 0:
        other = TITLES["lora" if lora.mean >= 0 else "untold"]
        return UNKNOWN, f"NaRA isn't better than {other} in the mean: {take}", None
    if any(d.low > -THRESHOLDS["pays"] for d in both):
        return UNKNOWN, f"an interval excludes {needed}, but not a smaller gain: {take}", None
    return (
        UNKNOWN,
        f"the intervals allow both {needed} and no gain: {take}, or raise --train_batch_size",
        None,
    )


def is_below(difference: Interval) -> bool:
    """Whether a loss is lower, clear of zero, and by so much that it pays."""
    return difference.high < 0 and difference.mean <= -THRESHOLDS["pays"]


def differences(repeats: Sequence[Repeat]) -> dict[str, dict[str, Interval]]:
    """{arm: {other: d}}, of NaRA from all others, and of a cheap way of telling λ from LoRA."""
    cheap = [arm for arm in WAYS if arm in repeats[0].losses]
    pairs = {"nara": ("lora", "untold", *cheap), **dict.fromkeys(cheap, ("lora",))}
    means = bin_means(repeats)
    return {
        a: {b: relative_difference(means[a], means[b]) for b in others}
        for a, others in pairs.items()
    }


def relative_difference(means: Tensor, others: Tensor) -> Interval:
    """Mean and interval of d, of two arms' means (repeats, BINS); d is 0 in bins where both are but rounding."""
    larger = torch.maximum(means, others)
    return interval(
        ((means - others) / larger).masked_fill(larger <= 1e-10, 0.0).nanmean(1).tolist()
    )


def mean_losses(repeats: Sequence[Repeat]) -> dict[str, float]:
    """{arm: its loss}, over all held-out samples."""
    return {
        arm: torch.cat([each.losses[arm] for each in repeats]).mean().item()
        for arm in repeats[0].losses
    }


def bin_means(repeats: Sequence[Repeat]) -> dict[str, Tensor]:
    """{arm: mean losses (repeats, BINS)}; NaN in bins without samples."""
    numbers = torch.stack(
        [(repeat.noise_level * BINS).long().clamp(0, BINS - 1) for repeat in repeats]
    )  # (repeats, n)
    inside = (numbers[:, None] == torch.arange(BINS)[:, None]).double()  # (repeats, BINS, n)
    losses = {
        arm: torch.stack([repeat.losses[arm].double() for repeat in repeats])
        for arm in repeats[0].losses
    }
    return {arm: (inside * each[:, None]).sum(2) / inside.sum(2) for arm, each in losses.items()}


def percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def described(difference: Interval) -> str:
    """A relative difference and its 95 % interval."""
    return f"{percent(difference.mean)} ({percent(difference.low)} to {percent(difference.high)})"


def check_training(task: CheckTask, run: Run) -> dict[str, Any]:
    """Repeat the short trainings of a train script's run until the verdict is clear, print it and write check.json into
    the run's folder. Returns the content of that."""
    if run.accelerator.num_processes > 1:
        raise ValueError(
            f"--check runs in one process, got {run.accelerator.num_processes}: start it by python."
        )
    repeats, verdict = decide(task, run.is_main)
    means = {arm: table.nanmean(0) for arm, table in bin_means(repeats).items()}
    bins = {
        f"{n / BINS:.1f} to {(n + 1) / BINS:.1f}": n
        for n in range(BINS)
        if not means["base"][n].isnan()
    }
    losses = {row: {arm: each[n].item() for arm, each in means.items()} for row, n in bins.items()}
    losses["all"] = mean_losses(repeats)
    content = {
        "verdict": verdict.answer,
        "reason": verdict.reason,
        "way": verdict.way,
        "model": run.args.pretrained_model_name_or_path,
        **{name: getattr(run.args, name) for name in ABOUT.split()},
        "cheap_rank": getattr(core_holders(task.model)[0].configs.get(CHEAP), "r", None),
        "measured": task.measured,
        "repeats": len(repeats),
        "differences": {
            a: {b: d._asdict() for b, d in each.items()} for a, each in differences(repeats).items()
        },
        "losses": losses,
    }
    path = run.folder / "check.json"
    write_json(path, content)
    cells = [[row, *(f"{loss:.4g}" for loss in each.values())] for row, each in losses.items()]
    table = format_table(("λ", *(TITLES[arm] for arm in means)), cells)
    sys.stdout.write(
        f"{task.measured}:\n{table}\n\n{verdict.answer}: {verdict.reason}\nall numbers are in {path}\n"
    )
    return content
