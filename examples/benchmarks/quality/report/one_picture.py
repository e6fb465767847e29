"""The table of results/one_picture.md: T-LoRA and others on one picture, from the records of the fresh seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mean_interval import interval

from quality.report.data import NOTHING, Record, change, rounded_mean, table
from quality.results import read

FIRST_SEED = 400
THEIRS = "tlora_residual"
"""The published T-LoRA, from which the others' differences are taken."""
MEASURES: dict[str, Callable[[Record], float]] = {
    "similarity + alignment": lambda record: record["similarity"] + record["text_alignment"],
    "similarity": lambda record: record["similarity"],
    "alignment": lambda record: record["text_alignment"],
    "place_similarity": lambda record: record["place_similarity"],
    "held-out loss": lambda record: record["validation_loss"],
}


def one_picture_table(folder: Path) -> str:
    """A row for each rank and arm, over the seeds that all arms of the rank have."""
    cells: dict[tuple[str, str, int], Record] = {}
    for record in read(folder / "one_picture.jsonl"):
        if record["seed"] >= FIRST_SEED:
            cells[record["domain"], record["method"], record["seed"]] = record
    rows = []
    for domain, method in dict.fromkeys((domain, method) for domain, method, _ in cells):
        seeds = seeds_of(cells, domain)
        of_method = [cells[domain, method, seed] for seed in seeds]
        theirs = [cells[domain, THEIRS, seed] for seed in seeds]
        if not seeds:
            continue
        first = MEASURES["similarity + alignment"]
        differences = [first(a) - first(b) for a, b in zip(of_method, theirs, strict=True)]
        figures = [rounded_mean(interval([value(record) for record in of_method])) for value in MEASURES.values()]
        rate, size = of_method[0]["learning_rate"], of_method[0]["trainable_parameters"]
        less = change(interval(differences), 3) if len(seeds) > 1 else f"{differences[0]:+.3f}"
        less = NOTHING if method == THEIRS else less
        count = str(len(seeds))
        rows.append([f"{method}, {domain.replace('_', ' ')}", count, f"{rate:g}", f"{size // 1000} k", *figures, less])
    return table(["arm", "seeds", "rate", "parameters", *MEASURES, f"sum less {THEIRS}'s"], rows)


def seeds_of(cells: dict[tuple[str, str, int], Record], domain: str) -> Sequence[int]:
    """The seeds that every arm of a rank has."""
    methods = {THEIRS, *(method for cell_domain, method, _ in cells if cell_domain == domain)}
    seeds = [
        {seed for rank, cell_domain, seed in cells if (rank, cell_domain) == (domain, method)} for method in methods
    ]
    return sorted(set.intersection(*seeds))
