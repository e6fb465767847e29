"""What there is to run: each job one training, named by all that it depends on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

COST = "cost"
STAGES = ("tune", "main", "single", "ablation", COST)
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
ABLATION_SEEDS = 3


@dataclass(frozen=True)
class Job:
    """Attributes:
    suite: "text" or "images".
    stage: "tune" (a trial of learning rates), "main" (all seeds), "single" (one seed), "ablation" or
        "cost" (a step's time beside LoRA's).
    backbone, domain, method, control, seed: as the records have them.
    settings: of the run, beside the learning rates that tuning chose.
    """

    suite: str
    stage: str
    backbone: str
    domain: str
    method: str
    control: str | None
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The job as text; its records bear it, by which a later call knows that it's done."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def title(self) -> str:
        """For a progress bar."""
        control = f" {self.control}" if self.control else ""
        return f"{self.stage} {self.backbone} {self.domain} {self.method}{control} {self.seed}"


def finished(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """The keys of the jobs that wrote all of their records: the last one says so."""
    return {record["job"] for record in records if record.get("last")}


def shard(jobs: list[Job], part: str) -> list[Job]:
    """Every N-th job, for "k/N" with k from 0: for N processes that share one results file.

    Raises:
        ValueError: `part` is something else.
    """
    first, slash, count = part.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise ValueError(f"shard is {part!r}, expected k/N with k from 0 to N - 1, such as 0/2")
    return jobs[int(first) :: int(count)]
