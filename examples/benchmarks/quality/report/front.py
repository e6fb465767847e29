"""The two tables of RESULTS.md, made from the records: regimes by what they ask, and ordinary fine-tuning. All others
lie in examples/benchmarks/results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quality.blocks.report import asked_row
from quality.regimes import alternatives
from quality.regimes.plan import PLAN, is_deciding
from quality.regimes.report import Confirmed, confirmed
from quality.report.data import NOTHING, Arm, Grid, Record, change, difference, read_records, select, table
from quality.report.tables import closed, loss_of, title
from quality.results import read
from quality.running import SEEDS

# ---------------------------------------------------------------------- regimes by what they ask

SHOWN = {
    "lora": "LoRA",
    "lora_params": "LoRA, NaRA's parameters",
    "dora": "DoRA",
    "nara": "NaRA",
    "nara_knots": "NaRA-Knots",
}
"""{arm: its column}."""


@dataclass(frozen=True)
class Asked:
    """Attributes:
    what: is asked.
    regime: whose cell on attention has the figures.
    simplest: the cheapest thing that was found to do as well as any adapter that knows λ, or better.
    arm: its runs: an arm of the regime's first plan, or the title of one in the plan of the alternatives.
    """

    what: str
    regime: str
    simplest: str
    arm: str


_IDENTITY, _BIAS = "the base, read by the identity", "LoRA and b(λ) on the input token's logit, r 4"
ASKED = {
    "Squared error of the prediction": (
        Asked("sample an ε-model as a v-model", "eps_to_v", "read ε̂ as v; no training", _IDENTITY),
        Asked("… of a schedule that ends in pure noise", "zero_snr", "the same", _IDENTITY),
        Asked("… as a rectified flow", "eps_to_flow", "the same", _IDENTITY),
    ),
    "Cross-entropy in nats a token": (
        Asked("random tokens for masks, open answers", "blind_open", "LoRA and a bias b(λ), ten numbers", _BIAS),
        Asked("… answers that follow from the prompt", "blind_determined", "LoRA, NaRA's size", "lora_params"),
        Asked("masks that can be counted, open answers", "seen_open", "LoRA", "lora"),
    ),
    "Share of the base's error": (
        Asked("a subject at λ < 0.5, the base elsewhere", "subject_low", "LoRA, off outside", "lora_gated"),
        Asked("two subjects, by λ", "two_conditions", "two LoRAs, switched", "lora_switched"),
    ),
}
"""{measure, with its unit: its rows}."""
CANVAS = ("Cross-entropy in nats a token", "DiffusionGemma's canvas, open answers", "LoRA and a bias b(λ), ten numbers")
"""The row of block diffusion: its measure, what is asked, the simplest."""


def asked_table(folder: Path) -> str:
    """A table a measure, a row a regime: held-out losses on attention at rank 4, over ten seeds."""
    records, alternative_records = read(folder / "regimes.jsonl"), read(folder / "alternatives.jsonl")
    cells = {p.cell.regime: confirmed(p, records) for p in PLAN if is_deciding(p.cell) and not p.label}
    header = ["what is asked", "simplest that does as well", "it", *SHOWN.values(), "NaRA − LoRA"]
    parts = []
    for measure, questions in ASKED.items():
        rows = [_asked_row(row, cells[row.regime], alternative_records) for row in questions]
        if measure == CANVAS[0]:
            rows.append([*CANVAS[1:], *asked_row(folder, SHOWN.values())])
        parts += [f"**{measure}**", table(header, rows)]
    return "\n\n".join(parts)


def _asked_row(row: Asked, cell: Confirmed, others: list[Record]) -> list[str]:
    if row.arm in cell.planned.arms:
        simplest = _sized(cell, row.arm)
    else:
        group = next(group for group in alternatives.GROUPS if group.regime == row.regime)
        simplest = _sized(alternatives.confirmed(group, others), row.arm)
    cells_of_arms = [_sized(cell, arm) for arm in SHOWN]
    return [row.what, row.simplest, simplest, *cells_of_arms, change(cell.difference("nara", "lora"), 3)]


def _sized(cell: Confirmed, arm: str) -> str:
    """The mean score of an arm, and its trained parameters in thousands."""
    score = cell.score(arm)
    if score is None:
        return NOTHING
    sizes = [record.get("trainable_parameters", 0) for (name, _), record in cell.records.items() if name == arm]
    size = f"{sizes[0] / 1000:.0f} k" if sizes[0] else "0"
    return f"{score.mean:.3f} ({size})"


# ---------------------------------------------------------------------- ordinary fine-tuning

METHODS = ("full", "dora", "nara", "nara_dora", "nara_knots", "nara_c", "multi_lora", "tlora")


def ordinary_table(folder: Path) -> str:
    """A row a method: its loss less LoRA's, and the share of the gap to training all weights that it closes."""
    header, columns = ["method"], []
    for name in ("text", "images"):
        records = select(read_records([folder / f"{name}.jsonl"]), stage="main")
        main = [record for record in records if record["seed"] in SEEDS]
        for backbone in dict.fromkeys(row["backbone"] for row in main):
            header += [f"{backbone}: loss − LoRA", "gap closed"]
            columns.append((Grid.of(select(main, backbone=backbone)), loss_of(name)))
    rows = []
    for method in METHODS:
        arm, cells = Arm(method), []
        for grid, loss in columns:
            is_measured = arm in grid.arms
            cells += [difference(grid.difference(arm, Arm("lora"), loss), loss.digits) if is_measured else NOTHING]
            cells += [closed(grid, arm) if is_measured else NOTHING]
        rows.append([title(arm), *cells])
    return table(header, rows)
