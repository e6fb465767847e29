"""The tables of the alternatives: the rates that were tried, and what ten fresh seeds say.

A difference is taken within a seed, whose arms meet the same data and noise; ± is half of a 95 % interval of Student's
t over the seeds. Of what isn't trained there is one figure for all seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nara_diffusion.utils.statistics import Interval, interval
from quality.regimes.alternatives import GROUPS, SEEDS, Group, described, registered_rates, trials, untried
from quality.regimes.plan import CONFIRM, Record, cell_of
from quality.report.data import NOTHING, change, spread, table

DIGITS = 4
FIRST = "as in the first plan"


def rates_table(records: Sequence[Record]) -> str:
    """A row an arm: what was tried on the development seed, and what was chosen."""
    rows = []
    for group in GROUPS:
        for arm in group.arms:
            tried = "; ".join(f"{described(rates)}: {score:.4f}" for rates, score in trials(arm, records))
            chosen = "open" if untried(arm, records) else described(registered_rates(arm, records))
            rows.append([group.name, arm.title, tried if arm.grid else FIRST, chosen])
    return table(["group", "method", "trials (rate, or rate / core's rate: score)", "chosen"], rows)


@dataclass(frozen=True)
class Confirmed:
    """A group's scores on the fresh seeds: {title: {seed: score}}, and a record of each that is trained."""

    group: Group
    scores: Mapping[str, Mapping[int, float | None]]
    examples: Mapping[str, Record]

    @property
    def done(self) -> int:
        return sum(len(self.scores[arm.title]) for arm in self.group.arms)

    @property
    def is_whole(self) -> bool:
        return self.done == len(self.group.arms) * len(SEEDS)

    def mean(self, title: str) -> Interval | None:
        values = list(self.scores[title].values())
        return None if None in values else interval(values)  # type: ignore[arg-type]

    def difference(self, one: str, other: str) -> Interval | None:
        """None where a run diverged."""
        pairs = [(self.scores[one][seed], self.scores[other][seed]) for seed in SEEDS]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        return interval(differences) if len(differences) == len(pairs) else None

    def size(self, title: str) -> str:
        """Trained parameters, and how many of them aren't a core's."""
        if title not in self.examples:
            return "0"
        record = self.examples[title]
        every, core = record["trainable_parameters"], record["core_parameters"]
        return f"{every} ({every - core})" if core else str(every)


def confirmed(group: Group, records: Sequence[Record]) -> Confirmed:
    """What `records` say of a group."""
    scores: dict[str, dict[int, float | None]] = {}
    examples = {}
    for arm in group.arms:
        own = [r for r in records if r["stage"] == CONFIRM and r["arm"] == arm.arm and cell_of(r) == arm.cell]
        scores[arm.title] = {record["seed"]: record["score"] for record in own}
        if own:
            examples[arm.title] = own[0]
    for record in records:
        if record["seed"] is None and record["regime"] == group.regime:
            scores[record["arm"]] = dict.fromkeys(SEEDS, record["score"])
    return Confirmed(group, scores, examples)


def report(records: Sequence[Record]) -> str:
    """A section a group: its arms, and the differences that the plan names."""
    return "\n\n".join(_section(confirmed(group, records)) for group in GROUPS)


def _section(cell: Confirmed) -> str:
    title = f"### {cell.group.name}: {cell.group.about}"
    if not cell.is_whole:
        return f"{title}\n\nOpen: {cell.done} of {len(cell.group.arms) * len(SEEDS)} runs are there."
    rows = [_row(cell, title) for title in cell.scores]
    pairs = [[one, other, change(cell.difference(one, other), DIGITS)] for one, other in cell.group.pairs]
    return "\n\n".join(
        [
            title,
            table(["method", "parameters (without the core)", "rate", "score ± deviation"], rows),
            table(["method", "less", "difference"], pairs),
        ]
    )


def _row(cell: Confirmed, title: str) -> list[str]:
    if title not in cell.examples:
        return [title, "0", NOTHING, f"{cell.scores[title][SEEDS[0]]:.{DIGITS}f}"]
    return [title, cell.size(title), described(cell.examples[title]["rates"]), spread(cell.mean(title), DIGITS)]


def front(records: Sequence[Record]) -> str:
    """A form of NaRA a row, and what stands against it."""
    rows = []
    for cell in (confirmed(group, records) for group in GROUPS):
        for pair in cell.group.front if cell.is_whole else ():
            of_each = [text for name in pair for text in (name, cell.size(name), _shown(cell.mean(name)))]
            rows.append([cell.group.name, *of_each, change(cell.difference(*pair), DIGITS)])
    header = ["regime", "a form of NaRA", "parameters", "loss", "an alternative", "parameters", "loss", "difference"]
    return table(header, rows)


def _shown(found: Interval | None) -> str:
    return NOTHING if found is None else f"{found.mean:.3f}"
