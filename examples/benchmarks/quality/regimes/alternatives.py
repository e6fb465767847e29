"""The alternatives to NaRA, as arms: what docs/results/alternatives_plan.md fixes before fresh seeds run.

Every arm tries equally many rates on a development seed; the best, by its score there, is confirmed on ten fresh seeds.
Where the best rate of an arm without a core is the first or last that was tried, the next one outward is tried too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from quality import results
from quality.regimes.plan import CONFIRM, Record, cell_of, key_of, rates_of
from quality.regimes.runs import Cell, Run
from quality.running import RESULTS

DEV, DEV_SEED = "dev", 100
SEEDS = tuple(range(300, 310))
PAGE = "docs/results/alternatives_plan.md"
RECORDS = RESULTS / "alternatives.jsonl"

# ---------------------------------------------------------------------- arms

Rates = Mapping[str, float]


def _rates(*rates: float, core: Sequence[float] = ()) -> tuple[Rates, ...]:
    if not core:
        return tuple({"learning_rate": rate} for rate in rates)
    return tuple({"learning_rate": rate, "core_learning_rate": own} for rate, own in product(rates, core))


STATIC = _rates(0.002, 0.005, 0.01, 0.02)
NARA = _rates(0.005, 0.01, core=(0.001, 0.0025))
KNOTS = _rates(0.005, 0.01, core=(0.0025, 0.01))
STATIC_TEXT = _rates(0.005, 0.01, 0.02, 0.04)
KNOTS_TEXT = _rates(0.01, 0.02, core=(0.003, 0.01))
FIRST_PLAN = ()
"""Rates are those that the first plan registered, by as many trials on the same development seed."""


@dataclass(frozen=True)
class Arm:
    """Attributes:
    title: in tables, unique in its group.
    cell, arm: as regimes train them.
    grid: the rates that are tried.
    """

    title: str
    cell: Cell
    arm: str
    grid: tuple[Rates, ...] = FIRST_PLAN


@dataclass(frozen=True)
class Group:
    """What is registered and confirmed together.

    Attributes:
        name, about: of the plan's table.
        regime: whose held-out set is the measure.
        arms: what is trained.
        pairs: of titles; the differences that are looked at, the first less the second.
        front: those of them that the front page shows.
    """

    name: str
    about: str
    regime: str
    arms: tuple[Arm, ...]
    pairs: tuple[tuple[str, str], ...]
    front: tuple[tuple[str, str], ...]

    def arm(self, title: str) -> Arm | None:
        """Of that title; None of what isn't trained."""
        return next((arm for arm in self.arms if arm.title == title), None)


IDENTITY = "the base, read by the identity"
TOLD, UNTOLD = "Bayes' rule, told λ", "Bayes' rule, not told λ"


def _conversion(regime: str) -> Group:
    on = "attention and time layers"
    arms = (
        Arm("LoRA, read by the identity, r 4", Cell(f"{regime}_read", "attention", 4, 200), "lora", STATIC),
        Arm("NaRA, r 4", Cell(regime, "attention", 4, 200), "nara"),
        Arm(f"LoRA, {on}, r 4", Cell(regime, "attention_time", 4, 200), "lora", STATIC),
        Arm(f"LoRA, {on}, r 14", Cell(regime, "attention_time", 14, 200), "lora", STATIC),
        Arm(f"NaRA, {on}, r 4", Cell(regime, "attention_time", 4, 200), "nara", NARA),
        Arm(f"NaRA-Knots, {on}, r 4", Cell(regime, "attention_time", 4, 200), "nara_knots", KNOTS),
        Arm(f"NaRA-Knots, {on}, r 11", Cell(regime, "attention_time", 11, 200), "nara_knots", KNOTS),
    )
    read, attention, small, large, nara, knots, knots_large = (arm.title for arm in arms)
    pairs = (
        *((attention, each) for each in (IDENTITY, read, small, large)),
        *((nara, each) for each in (IDENTITY, read, small, large)),
        *((knots, each) for each in (small, nara)),
        *((knots_large, each) for each in (IDENTITY, read, large, nara)),
    )
    about = "an ε-model learns to predict v" + ", with zero terminal SNR" * (regime == "zero_snr")
    return Group(regime, about, regime, arms, pairs, ((attention, IDENTITY), (nara, large), (knots_large, read)))


def _blind() -> Group:
    regime, told, biased = "blind_open", "blind_open_told", "blind_open_bias"
    arms = (
        Arm("LoRA, λ as a token, r 4", Cell(told, "attention", 4, 200), "lora", STATIC_TEXT),
        Arm("LoRA, λ as a token, r 43", Cell(told, "attention", 43, 200), "lora", STATIC_TEXT),
        Arm("LoRA and b(λ) on the input token's logit, r 4", Cell(biased, "attention", 4, 200), "lora", STATIC_TEXT),
        Arm("NaRA, r 4", Cell(regime, "attention", 4, 200), "nara"),
        Arm("NaRA-Knots, r 4", Cell(regime, "attention", 4, 200), "nara_knots"),
        Arm("NaRA-Knots, r 27", Cell(regime, "attention", 27, 200), "nara_knots", KNOTS_TEXT),
    )
    token, token_large, bias, nara, knots, knots_large = (arm.title for arm in arms)
    pairs = (
        *((nara, each) for each in (token, token_large, bias)),
        *((knots, each) for each in (token, bias, nara)),
        *((knots_large, each) for each in (token_large, bias, nara)),
    )
    front = ((nara, token), (knots_large, token_large))
    return Group(regime, "a model of random tokens learns answers that nothing foretells", regime, arms, pairs, front)


def _equal(name: str, about: str, cell: Cell) -> Group:
    arms = (
        Arm("LoRA, NaRA's parameters", cell, "lora_params", _rates(0.002, 0.003, 0.005, 0.01, 0.02)),
        Arm(f"NaRA, r {cell.rank}", cell, "nara"),
    )
    return Group(name, about, "eps_to_v", arms, ((arms[1].title, arms[0].title),), ())


def _offset() -> Group:
    of = [("LoRA, r 14", "lora", 14, STATIC), ("DoRA, r 14", "dora", 14, STATIC), ("NaRA, r 4", "nara", 4, NARA)]
    of += [("NaRA-Knots, r 11", "nara_knots", 11, KNOTS)]
    arms = [Arm(title, Cell("noise_offset", "attention_time", r, 200), arm, grid) for title, arm, r, grid in of]
    gain = "a gain of each channel's mean, by bins of λ"
    arms.append(Arm(gain, Cell("noise_offset_gain", "output", 0, 200), "gain", STATIC_TEXT))
    lora, dora, nara, knots, _ = (arm.title for arm in arms)
    pairs = [(form, each) for form in (nara, knots) for each in (lora, dora, gain)]
    about = "ε under --noise_offset 0.3, attention and time layers; share of the base's loss"
    return Group("noise_offset", about, "noise_offset", tuple(arms), (*pairs, (knots, nara)), ((knots, dora),))


def _ordinary() -> Group:
    all_of = [("LoRA, r 4", "lora", 4, STATIC), ("LoRA, r 5", "lora", 5, STATIC), ("DoRA, r 4", "dora", 4, STATIC)]
    all_of += [("NaRA-Knots, r 4", "nara_knots", 4, KNOTS)]
    arms = tuple(Arm(title, Cell("eps_to_v_read", "all", r, 200), arm, grid) for title, arm, r, grid in all_of)
    pairs = tuple(("NaRA-Knots, r 4", each) for each in ("LoRA, r 4", "LoRA, r 5", "DoRA, r 4"))
    about = "ordinary tuning: ε, weighted by 1 / ᾱ, all layers"
    return Group("ordinary", about, "eps_to_v", arms, pairs, pairs[-1:])


def _flow() -> Group:
    arm = Arm("LoRA, read by the identity, r 4", Cell("eps_to_flow_read", "attention", 4, 200), "lora", STATIC)
    return Group("eps_to_flow", "an ε-model becomes a flow", "eps_to_flow", (arm,), ((arm.title, IDENTITY),), ())


GROUPS = (
    _conversion("eps_to_v"),
    _blind(),
    _conversion("zero_snr"),
    _equal("eps_to_v_wide", "eps_to_v on attention, at rank 16", Cell("eps_to_v", "attention", 16, 200)),
    _offset(),
    _ordinary(),
    _equal("eps_to_v_long", "eps_to_v on attention, in 800 steps", Cell("eps_to_v", "attention", 4, 800)),
    _flow(),
)
NAMES = tuple(group.name for group in GROUPS)


def chosen(names: Sequence[str]) -> list[Group]:
    """The groups of these names.

    Raises:
        ValueError: there is none of such a name.
    """
    if unknown := sorted(set(names) - set(NAMES)):
        raise ValueError(f"--groups has {', '.join(unknown)}, expected of {', '.join(NAMES)}")
    return [next(group for group in GROUPS if group.name == name) for name in names]


# ---------------------------------------------------------------------- rates

Trials = list[tuple[Rates, float]]
"""(rates, score), a score of infinity of training that diverged."""


def trials(arm: Arm, records: Sequence[Record]) -> Trials:
    """Those that were made, the lowest rate first."""
    own = [r for r in records if r["stage"] == DEV and r["seed"] == DEV_SEED and r["arm"] == arm.arm]
    found = {key_of(r): r for r in own if cell_of(r) == arm.cell}
    made = [(r["rates"], float("inf") if r["score"] is None else r["score"]) for r in found.values()]
    return sorted(made, key=lambda trial: tuple(trial[0].values()))


def untried(arm: Arm, records: Sequence[Record]) -> list[Rates]:
    """What is to be tried next: the rest of the grid; then one outward of a best rate at an end, without a core."""
    made = trials(arm, records)
    known = [rates for rates, _ in made]
    if left := [rates for rates in arm.grid if rates not in known]:
        return left
    if len(arm.grid[0] if arm.grid else NARA[0]) > 1:
        return []
    best = min(range(len(made)), key=lambda index: made[index][1])
    if 0 < best < len(made) - 1:
        return []
    return [{"learning_rate": known[best]["learning_rate"] * (2 if best else 0.5)}]


def registered_rates(arm: Arm, records: Sequence[Record]) -> Rates:
    """Those of the trial with the lowest score.

    Raises:
        ValueError: trials are missing.
    """
    if not arm.grid:
        return rates_of(arm.cell, arm.arm)
    if left := untried(arm, records):
        raise ValueError(f"{arm.title} of {arm.cell.regime}: no trial yet of {left}; run --stage dev first.")
    return min(trials(arm, records), key=lambda trial: trial[1])[0]


# ---------------------------------------------------------------------- runs


def development(folder: Path = RESULTS) -> list[Record]:
    """The records, those of the first plan too."""
    return [*results.read(folder / "regimes.jsonl"), *results.read(folder / RECORDS.name)]


def registered() -> list[str]:
    """The groups that the committed plan names."""
    shown = subprocess.run(["git", "show", f"HEAD:{PAGE}"], capture_output=True, text=True, check=True, cwd=RESULTS)
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith("Registered: "))
    return line.removeprefix("Registered: ").partition(" (")[0].split(", ")


def next_run(groups: Sequence[Group], stage: str, seeds: Sequence[int] = SEEDS) -> Run | None:
    """The first that is missing: group after group, and in a group seed after seed.

    Raises:
        ValueError: a group that the committed plan doesn't register.
    """
    known = development()
    if stage == DEV:
        arms = [arm for group in groups for arm in group.arms]
        return next((Run(arm.cell, arm.arm, DEV_SEED, rates) for arm in arms for rates in untried(arm, known)), None)
    if missing := [group.name for group in groups if group.name not in registered()]:
        raise ValueError(f"{', '.join(missing)}: not registered in the committed {PAGE}.")
    done = {key_of(record) for record in known if record["stage"] == CONFIRM}
    for group in groups:
        rated = [(arm, registered_rates(arm, known)) for arm in group.arms]
        for seed in seeds:
            for arm, rates in rated:
                run = Run(arm.cell, arm.arm, seed, rates)
                if key_of(run.named) not in done:
                    return run
    return None


def described(rates: Rates) -> str:
    return " / ".join(f"{value:g}" for value in rates.values())


def make_runs(groups: Sequence[Group], stage: str, make: Any) -> None:
    """Makes the missing runs one after another; each is on the disk before the next begins."""
    while run := next_run(groups, stage):
        record = make(run, stage)
        results.append(RECORDS, [record])
        print(
            f"{record['date']} {stage} {run.cell.regime} {run.cell.targets} r{run.cell.rank} {run.arm} {run.seed}",
            end=" ",
        )
        print(f"{described(run.rates)}: {record['score']} in {record['core_seconds']} s", flush=True)
