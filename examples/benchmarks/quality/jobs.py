"""What there is to run: methods × domains × seeds of the two suites, text and images, each job one training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

Settings = Mapping[str, Any]

STAGES = ("tune", "main")
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
METHODS = ("full", "lora", "dora", "nara", "nara_dora", "nara_knots", "nara_c", "multi_lora", "tlora")
CONTROLS = ("constant", "shuffled")
"""Those that need a training of their own."""
RANKS = {"text": 1, "images": 1}
"""r of every adapter: the smallest, where LoRA is furthest from full fine-tuning."""
TUNE_DOMAINS = {"text": ("commonsense",), "images": ("house",)}
"""On what learning rates are tried."""


def is_noise_aware(method: str) -> bool:
    """Whether it is a NaRA that reads λ, which the controls are made for."""
    return method.startswith("nara") and method != "nara_c"


def rates(*values: float) -> tuple[Settings, ...]:
    """A trial for each rate, of methods without a core."""
    return tuple({"learning_rate": value} for value in values)


def with_core(*pairs: tuple[float, float]) -> tuple[Settings, ...]:
    """A trial for each (rate of A and B, rate of the core)."""
    return tuple({"learning_rate": factors, "core_learning_rate": core} for factors, core in pairs)


@dataclass(frozen=True)
class Job:
    """Attributes:
    suite: "text" or "images".
    stage: "tune" (a trial of learning rates) or "main" (all seeds).
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
    settings: Settings = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The job as text; its records bear it, by which a later call knows that it's done."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def title(self) -> str:
        """For a progress bar."""
        control = f" {self.control}" if self.control else ""
        return f"{self.stage} {self.backbone} {self.domain} {self.method}{control} {self.seed}"


@dataclass(frozen=True)
class Suite:
    """Attributes:
    name: of the suite.
    backbones, domains: what the methods are compared on, in the order of running.
    trials: method → the learning rates that tuning tries, equally many for each.
    run: job, its settings → its records.
    """

    name: str
    backbones: tuple[str, ...]
    domains: tuple[str, ...]
    trials: Callable[[str], tuple[Settings, ...]]
    run: Callable[[Job, Settings], list[dict[str, Any]]]

    def tune(self, backbones: Sequence[str], methods: Sequence[str], settings: Settings) -> Iterator[Job]:
        """Every trial of every method, on the seed for tuning."""
        for backbone, domain, method in product(backbones, TUNE_DOMAINS[self.name], methods):
            for trial in self.trials(method):
                yield Job(self.name, "tune", backbone, domain, method, None, TUNING_SEED, {**settings, **trial})

    def main(
        self,
        backbones: Sequence[str],
        domains: Sequence[str],
        methods: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
    ) -> Iterator[Job]:
        """Seed after seed, so that what a stop leaves behind is complete for the seeds that were reached."""
        for seed, backbone, domain, method in product(seeds, backbones, domains, methods):
            for control in (None, *(CONTROLS if is_noise_aware(method) else ())):
                yield Job(self.name, "main", backbone, domain, method, control, seed, settings)


def load_suite(name: str) -> Suite:
    """The suite "text" or "images"; its models' code is imported only here."""
    if name == "text":
        from quality.text.suite import SUITE
    else:
        from quality.images.suite import SUITE
    return SUITE
