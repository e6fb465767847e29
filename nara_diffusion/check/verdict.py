"""Is λ likely to pay? The relative differences of held-out losses, rules in their order (docs/check.md), and a report.

    d_k = mean over bins of λ of  (ℓ − ℓ') / max(ℓ, ℓ')        in repeat k

ℓ is NaRA's mean loss on the held-out samples in a bin, ℓ' another arm's. d lies between −1 and 1, so that one training
that fails doesn't decide the result. All bins count alike, since losses differ by orders of magnitude: an ε-model's
loss at much noise is a hundredth of that at little noise. The 95 % interval over the repeats (Student's t) covers the
differences between trainings and those between samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nara_diffusion.training.report import format_table, write_json
from nara_diffusion.training.run import Run
from nara_diffusion.utils.atomic_write import atomic_write
from nara_diffusion.utils.statistics import Interval, interval

from .trials import ARMS, CheckSettings, CheckTask, Repeat, trials

TITLES = {"base": "base", "lora": "LoRA", "untold": "without λ", "nara": "NaRA"}
BINS = 10  # equal parts of [0, 1], where λ is
ABOUT = ("rank", "target_modules", "learning_rate", "core_learning_rate", "seed")  # arguments in check.json
ROUNDING = 1e-10  # losses up to this are float32 rounding
LIKELY, UNLIKELY, UNKNOWN = "λ is likely to pay", "λ is unlikely to pay", "can't say"
CHEAPER = (
    "NaRA isn't the only way of telling λ: try first, since this check doesn't, LoRA or DoRA on the time layers too, "
    "λ as a token of the prompt, or for a conversion the base as it is, read in the other form (docs/conversion.md)."
)
THRESHOLDS = {"pays": 0.02, "nothing": 0.005, "learnt": 0.02, "fewest": 3}
"""The relative gain of NaRA's loss from which on λ pays; the largest mean gain at which λ is said not to pay, since a
larger one may grow with more steps; the gain of the lowest loss over the base's without which the trainings show
nothing; and the least number of repeats for a verdict."""


class Verdict(NamedTuple):
    """LIKELY, UNLIKELY or UNKNOWN; and the numbers, with what to do if it is UNKNOWN."""

    answer: str
    reason: str


class BinLosses(NamedTuple):
    """The bin of λ from `low` to `high`: {arm: mean loss}, and NaRA's relative difference from LoRA."""

    low: float
    high: float
    losses: dict[str, float]
    difference: Interval


def decide(task: CheckTask, settings: CheckSettings, progress: bool) -> tuple[list[Repeat], Verdict]:
    """Repeat the short trainings until the verdict is clear, or `settings.repeats` times."""
    repeats: list[Repeat] = []
    for repeat in trials(task, settings, progress):
        repeats.append(repeat)
        if len(repeats) >= THRESHOLDS["fewest"] and (verdict := judge(repeats)).answer != UNKNOWN:
            return repeats, verdict
    return repeats, judge(repeats)


def judge(repeats: Sequence[Repeat]) -> Verdict:
    """The verdict of the first rule that applies."""
    losses, pays, learnt = mean_losses(repeats), percent(-THRESHOLDS["pays"]), THRESHOLDS["learnt"]
    change = min(losses[arm] for arm in ARMS) / losses["base"] - 1
    if change > -learnt:
        return Verdict(
            UNKNOWN,
            f"the lowest loss differs from the base model's by {percent(change)}, and {percent(-learnt)} is needed to "
            "show anything: raise the learning rate or the steps, or lower the rate if the loss rose.",
        )
    lora, untold = differences = [relative_difference(repeats, other) for other in ("lora", "untold")]
    found = f"NaRA's held-out loss differs from LoRA's by {described(lora)} and from that of NaRA without λ by "
    found += f"{described(untold)}, in {len(repeats)} repeats"
    is_lower = all(difference.high < 0 for difference in differences)
    if is_lower and all(difference.mean <= -THRESHOLDS["pays"] for difference in differences):
        return Verdict(LIKELY, f"{found}: both intervals are below zero, and both means are {pays} or lower. {CHEAPER}")
    if is_lower:
        more = "take more steps, with which the gain may grow"
        return Verdict(UNKNOWN, f"{found}: both intervals are below zero, but not both means are {pays}: {more}.")
    # an interval that excludes a gain that pays and includes none, whose mean shows no gain that may grow
    if any(d.low > -THRESHOLDS["pays"] and d.mean > -THRESHOLDS["nothing"] and d.high >= 0 for d in differences):
        return Verdict(UNLIKELY, f"{found}: one interval is above {pays} and not below zero.")
    return Verdict(UNKNOWN, f"{found}: the intervals allow both {pays} and no gain: take more repeats.")


def relative_difference(repeats: Sequence[Repeat], other: str) -> Interval:
    """The mean and the interval of d from the arm `other`; see the module's docstring."""
    return interval(_differences(_bin_means(repeats), other).nanmean(1).tolist())


def mean_losses(repeats: Sequence[Repeat]) -> dict[str, float]:
    """{arm: its loss}, over all held-out samples."""
    return {arm: fmean(repeat.losses[arm].mean().item() for repeat in repeats) for arm in TITLES}


def by_bins(repeats: Sequence[Repeat]) -> list[BinLosses]:
    """The losses of each bin of λ that has samples."""
    rows = []
    for number, means in enumerate(_bin_means(repeats).unbind(1)):
        inside = means[~means[:, 0].isnan()]  # (repeats that have samples there, arms)
        if len(inside):
            losses = dict(zip(TITLES, inside.mean(0).tolist(), strict=True))
            difference = interval(_differences(inside, "lora").tolist())
            rows.append(BinLosses(number / BINS, (number + 1) / BINS, losses, difference))
    return rows


def _bin_means(repeats: Sequence[Repeat]) -> Tensor:
    """Mean losses (repeats, BINS, arms, the base's first); NaN in bins without samples."""
    tables = []
    for repeat in repeats:
        numbers = (repeat.noise_level * BINS).long().clamp(0, BINS - 1)  # (n,)
        losses = torch.stack([repeat.losses[arm].double() for arm in TITLES], 1)  # (n, arms)
        sums = losses.new_zeros(BINS, len(TITLES)).index_add(0, numbers, losses)
        tables.append(sums / numbers.bincount(minlength=BINS)[:, None])
    return torch.stack(tables)


def _differences(means: Tensor, other: str) -> Tensor:
    """NaRA's relative differences (…) of `means` (…, arms); 0 where the losses are no more than rounding."""
    nara, against = means[..., -1], means[..., list(TITLES).index(other)]
    larger = torch.maximum(nara, against)
    return ((nara - against) / larger).masked_fill(larger <= ROUNDING, 0.0)


def percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def described(difference: Interval) -> str:
    """A relative difference and its 95 % interval, if it has one."""
    if math.isnan(difference.low):
        return percent(difference.mean)
    return f"{percent(difference.mean)} ({percent(difference.low)} to {percent(difference.high)})"


def check_training(task: CheckTask, run: Run) -> dict[str, Any]:
    """Repeat the short trainings of a train script's run until the verdict is clear, print it, and write check.json and
    check.png into the run's folder. Returns the content of check.json."""
    if run.accelerator.num_processes > 1:
        raise ValueError(
            f"--check runs in one process, got {run.accelerator.num_processes}: start it by python, not accelerate "
            "launch."
        )
    settings = CheckSettings()
    repeats, verdict = decide(task, settings, run.is_main)
    bins, losses = by_bins(repeats), mean_losses(repeats)
    differences = {other: relative_difference(repeats, other) for other in ("lora", "untold")}
    content = {
        "verdict": verdict.answer,
        "reason": verdict.reason,
        "thresholds": THRESHOLDS,
        "model": run.args.pretrained_model_name_or_path,
        **{name: getattr(run.args, name) for name in ABOUT},
        "settings": asdict(settings),
        "repeats": len(repeats),
        "differences": {other: _known(difference) for other, difference in differences.items()},
        "losses": losses,
        "bins": [row._asdict() | {"difference": _known(row.difference)} for row in bins],
    }
    rows = [_row(f"{row.low:.1f} to {row.high:.1f}", row.losses, row.difference) for row in bins]
    rows.append(_row("all", losses, differences["lora"]))
    table = format_table(("λ", *TITLES.values(), "NaRA against LoRA"), rows)
    numbers, picture = run.folder / "check.json", run.folder / "check.png"
    write_json(numbers, content)
    _draw(picture, bins, verdict.answer)
    files = f"all numbers are in {numbers}, drawn in {picture}"
    sys.stdout.write(f"{table}\n\n{verdict.answer}: {verdict.reason}\n{files}\n")
    return content


def _row(name: str, losses: Mapping[str, float], difference: Interval) -> list[str]:
    return [name, *(f"{losses[arm]:.4g}" for arm in TITLES), described(difference)]


def _known(values: Interval) -> dict[str, float | None]:
    """None in place of nan, which JSON lacks."""
    return {name: None if math.isnan(value) else value for name, value in values._asdict().items()}


def _draw(path: Path, bins: Sequence[BinLosses], title: str) -> None:
    """Write a PNG of the losses over λ, and of NaRA's relative difference from LoRA with its intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    centres = [(row.low + row.high) / 2 for row in bins]
    for arm, name in TITLES.items():
        losses.plot(centres, [row.losses[arm] for row in bins], "o-", label=name)
    losses.set(xlabel="noise level λ", ylabel="held-out loss", xlim=(0, 1))
    losses.legend()
    means = [100 * row.difference.mean for row in bins]
    reach = [100 * (row.difference.high - row.difference.mean) for row in bins]
    differences.errorbar(centres, means, [0 if math.isnan(each) else each for each in reach], fmt="o", capsize=4)
    differences.axhline(0, color="gray", linewidth=1)
    differences.set(xlabel="noise level λ", ylabel="NaRA against LoRA, %", xlim=(0, 1))
    figure.suptitle(title)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)
