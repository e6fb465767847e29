"""What the confirmation seeds say: paired differences with 95 % intervals, bins of λ, and each condition of the plan.

The unit is the seed: all arms of a seed meet the same data and noise, so that a difference is taken within it. The
intervals are Student's t over the seeds; see examples/benchmarks/results/regimes_plan.md for what has to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mean_interval import Interval, interval

from quality.images.held_out import bin_centres
from quality.regimes.plan import CONFIRM, CONFIRM_SEEDS, Planned, Record, cell_of, is_deciding
from quality.regimes.runs import MEAN_CORE
from quality.report.data import NOTHING, Arm, below_zero, change, rounded_mean, spread, table
from quality.report.tables import title

PEERS = ("lora", "lora_params", "dora")
ABLATIONS = ("nara_constant", "nara_shuffled")
SIMPLER = ("lora_gated", "lora_switched")
"""Peers of single regimes, which know λ by a switch."""
ONE_IMAGE_PEERS = ("lora", "lora_params", "tlora", "lora_less_noisy")
CANDIDATES = ("nara", "nara_dora", "nara_knots")
"""Which may win a regime, the published one first."""
WINDOWS = {"subject_low": (0, 0.5), "subject_high": (0.5, 1)}
"""λ in which the regime trains on data; elsewhere the base is to stay."""
DRAWN = ("alignment", "retrieval")
DIGITS = 4

Value = Callable[[Record], float | None]


@dataclass(frozen=True)
class Confirmed:
    """The confirmation runs {(arm, seed): record} of what is compared; an arm's mean C(λ) is the arm "… mean_core".

    `planned` has the names of the `arms`: a cell of the plan, or a group of the alternatives'.
    """

    planned: Any
    records: Mapping[tuple[str, int], Record]
    seeds: Sequence[int] = CONFIRM_SEEDS

    @property
    def done(self) -> int:
        return sum((arm, seed) in self.records for arm in self.planned.arms for seed in self.seeds)

    @property
    def due(self) -> int:
        return len(self.planned.arms) * len(self.seeds)

    @property
    def is_whole(self) -> bool:
        """Whether each arm has each seed: nothing is said before."""
        return self.done == self.due

    @property
    def arms(self) -> list[str]:
        """In the plan's order, each followed by its mean C(λ) if it was evaluated with that."""
        names = [name for arm in self.planned.arms for name in (arm, with_mean_core(arm))]
        return [name for name in names if any(arm == name for arm, _ in self.records)]

    def score(self, arm: str) -> Interval | None:
        """Mean, deviation and interval over its seeds; None if a run is missing or diverged."""
        values = [record["score"] for (name, _), record in self.records.items() if name == arm]
        return interval(values) if values and None not in values else None

    def difference(self, arm: str, other: str, value: Value = lambda record: record["score"]) -> Interval | None:
        """Of `arm` less `other` over the seeds that both have; None below two, or where one diverged."""
        seeds = sorted({seed for name, seed in self.records if name == arm and (other, seed) in self.records})
        pairs = [(value(self.records[arm, seed]), value(self.records[other, seed])) for seed in seeds]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        return interval(differences) if len(differences) == len(pairs) > 1 else None

    def bins(self, arm: str, other: str) -> list[Interval | None]:
        """The difference in each bin of λ: of the losses, where a regime has a window of the drifts outside of it."""
        values = [_of_bin(self.planned.cell.regime, index) for index in range(len(bin_centres()))]
        return [self.difference(arm, other, value) for value in values]


def with_mean_core(arm: str) -> str:
    return f"{arm} {MEAN_CORE}"


def confirmed(planned: Planned, records: Iterable[Record]) -> Confirmed:
    """Those of `records` that are of this cell's confirmation."""
    by_run: dict[tuple[str, int], Any] = {}
    for record in records:
        if record["stage"] == CONFIRM and cell_of(record) == planned.cell:
            by_run[record["arm"], record["seed"]] = record
            if MEAN_CORE in record:
                trained = {name: value for name, value in record.items() if name not in DRAWN}
                by_run[with_mean_core(record["arm"]), record["seed"]] = trained | record[MEAN_CORE]
    return Confirmed(planned, by_run)


def conditions(cell: Confirmed, candidate: str) -> dict[str, bool | None]:
    """{condition of the plan: whether `candidate` meets it}, None where runs are missing.

    Of a cell that decides its regime all conditions of the plan; of another those whose arms it has.
    """
    decides, arms = is_deciding(cell.planned.cell), cell.planned.arms
    has_looks = cell.planned.cell.regime == "one_image"
    simpler = [peer for peer in arms if peer.startswith(SIMPLER)]
    peers = ONE_IMAGE_PEERS if has_looks else (*PEERS, *simpler)
    ablations = ABLATIONS if candidate == "nara" else ()
    if not decides:
        peers, ablations = (tuple(name for name in names if name in arms) for names in (peers, ablations))
    are_met = {f"below {peer}": _below(cell, candidate, peer) for peer in peers}
    if not has_looks:
        lower = [of_bin and of_bin.mean < 0 for of_bin in cell.bins(candidate, "lora")]
        are_met["below lora in every bin"] = None if None in lower else all(lower)
        ablations = (*ablations, with_mean_core(candidate))
    return are_met | {f"{name} is worse": _below(cell, candidate, name) for name in ablations}


def report(plan: Sequence[Planned], records: Sequence[Record]) -> str:
    """As Markdown, a section for each cell that has confirmation runs."""
    cells = [confirmed(planned, records) for planned in plan]
    return "\n\n".join(_section(cell) for cell in cells if cell.done) or "No confirmation run is there yet."


def _section(cell: Confirmed) -> str:
    setting = cell.planned.cell
    seeds = len({seed for arm, seed in cell.records if arm in cell.planned.arms})
    name = cell.planned.label or setting.regime
    title = f"### {name}: {setting.targets}, rank {setting.rank}, {setting.steps} steps ({seeds} seeds)"
    if not cell.is_whole:
        return f"{title}\n\n{cell.done} of {cell.due} runs are there; nothing is said before all are."
    said = [_verdict(cell, arm) for arm in CANDIDATES if arm in cell.arms]
    if cell.planned.label:
        said = [f"**{arm} less nara:** {change(cell.difference(arm, 'nara'), DIGITS)}." for arm in cell.planned.arms]
    return "\n\n".join([title, _scores(cell), *_samples(cell), *_looks(cell), *said])


def _scores(cell: Confirmed) -> str:
    header = ["method", "parameters", "score ± deviation", "less LoRA", "bins below LoRA"]
    return table(header, [_row(cell, arm) for arm in cell.arms])


def _row(cell: Confirmed, arm: str) -> list[str]:
    size = next(record.get("trainable_parameters") for (name, _), record in cell.records.items() if name == arm)
    lower = [interval_of_bin is not None and interval_of_bin.mean < 0 for interval_of_bin in cell.bins(arm, "lora")]
    difference = "–" if arm == "lora" else change(cell.difference(arm, "lora"), DIGITS)
    return [arm, "–" if size is None else str(size), spread(cell.score(arm), DIGITS), difference, str(sum(lower))]


def _samples(cell: Confirmed) -> list[str]:
    """A table of what was drawn, if anything was."""
    drawn = [arm for arm in cell.arms if any(name == arm and "alignment" in r for (name, _), r in cell.records.items())]
    rows = [[arm, *(text for measure in DRAWN for text in _drawn(cell, arm, measure))] for arm in drawn]
    header = ["samples", *(text for measure in DRAWN for text in (measure, f"{measure} less LoRA"))]
    return [table(header, rows)] if rows else []


def _looks(cell: Confirmed) -> list[str]:
    """A table of what was seen in training, if anything was."""
    looks = {run: record["looks"] for run, record in cell.records.items() if "looks" in record}
    return [similarity_table(looks, cell.arms)] if looks else []


def _drawn(cell: Confirmed, arm: str, measure: str) -> tuple[str, str]:
    """The mean over seeds, and its paired difference to LoRA."""
    values = [record[measure] for (name, _), record in cell.records.items() if name == arm and measure in record]
    difference = "–" if arm == "lora" else change(cell.difference(arm, "lora", lambda record: record.get(measure)), 3)
    return spread(interval(values), 3), difference


def _verdict(cell: Confirmed, candidate: str) -> str:
    """Whether `candidate` wins; of a cell that doesn't decide its regime, what it meets alone."""
    words = {True: "yes", False: "no", None: "open"}
    are_met = conditions(cell, candidate)
    won = None if None in are_met.values() else all(are_met.values())
    named = "; ".join(f"{condition}: {words[met]}" for condition, met in are_met.items())
    wins = f" wins: {words[won]}." if is_deciding(cell.planned.cell) else ":"
    return f"**{candidate}{wins}** {named}."


def _below(cell: Confirmed, arm: str, other: str) -> bool | None:
    interval_of_seeds = cell.difference(arm, other)
    return None if interval_of_seeds is None else below_zero(interval_of_seeds)


def _of_bin(regime: str, index: int) -> Value:
    def value(record: Record) -> float | None:
        low, high = WINDOWS.get(regime, (0, 1))
        inside = low <= bin_centres()[index] < high
        values = record["losses" if inside else "drifts"] if record["losses"] is not None else None
        return None if values is None else values[index]

    return value


# ---------------------------------------------------------------------- one image

Look = Mapping[str, float]
"""step, similarity, alignment."""
LEVELS = (0.36, 0.38, 0.44, 0.47, 0.5)
"""Of similarity. The first two were chosen after the runs of rank 16, as such that nearly all of them reach."""
FEWEST = 5
"""Pairs of seeds of which a difference is shown."""


def similarity_table(looks: Mapping[tuple[str, int], Sequence[Look]], arms: Sequence[str]) -> str:
    """Of each arm and level: how many seeds reach it, and the best alignment there less LoRA's, over the seeds in which
    both do. `looks` are those of {(arm, seed)}."""
    header = ["alignment less LoRA (seeds), at a similarity of", *(f"{level:.2f}" for level in LEVELS)]
    return table(header, [[arm, *(_cell(looks, arm, level) for level in LEVELS)] for arm in arms])


def _cell(looks: Mapping[tuple[str, int], Sequence[Look]], arm: str, level: float) -> str:
    by_seed, peer = _reached(looks, arm, level), _reached(looks, "lora", level)
    differences = [by_seed[seed] - peer[seed] for seed in sorted(by_seed.keys() & peer.keys())]
    text = change(interval(differences), 3) if arm != "lora" and len(differences) >= FEWEST else NOTHING
    return f"{text} ({len(by_seed)})"


def _reached(looks: Mapping[tuple[str, int], Sequence[Look]], arm: str, level: float) -> dict[int, float]:
    """{seed: the best alignment of a look whose similarity is `level` or more}, of the seeds that have one."""
    best = {}
    for (name, seed), of_run in looks.items():
        reached = [look["alignment"] for look in of_run if look["similarity"] >= level]
        if name == arm and reached:
            best[seed] = max(reached)
    return best


# ---------------------------------------------------------------------- the summary

SHOWN = {
    "lora": "LoRA",
    "lora_params": "LoRA, NaRA's parameters",
    "dora": "DoRA",
    "nara": "NaRA",
    "nara_constant": "NaRA told λ = 0.5",
    "nara_knots": "NaRA-Knots",
    "full": "all weights",
}


def summary(plan: Sequence[Planned], records: Sequence[Record]) -> str:
    """As a table; in words that none is whole yet."""
    cells = [cell for cell in (confirmed(planned, records) for planned in plan if not planned.label) if cell.is_whole]
    if not cells:
        return "No regime's confirmation is whole yet."
    header = ["regime", *SHOWN.values(), "NaRA − LoRA", "won by"]
    return table(header, [_summary_row(cell) for cell in cells])


def _summary_row(cell: Confirmed) -> list[str]:
    setting = cell.planned.cell
    name = (
        setting.regime
        if is_deciding(setting)
        else f"{setting.regime}, {setting.targets}, rank {setting.rank}, {setting.steps} steps"
    )
    return [
        name,
        *(rounded_mean(cell.score(arm)) for arm in SHOWN),
        change(cell.difference("nara", "lora"), DIGITS),
        winners(cell),
    ]


def winners(cell: Confirmed) -> str:
    """The forms of NaRA that meet every condition of the plan; nothing where the cell doesn't decide its regime."""
    if not is_deciding(cell.planned.cell):
        return NOTHING
    won = [arm for arm in CANDIDATES if arm in cell.arms and all(conditions(cell, arm).values())]
    return ", ".join(title(Arm(arm)) for arm in won) or "none"
