"""The two suites, text and images, as one table: what each compares, on what, and how one run is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quality.jobs import Job

MUST = ("full", "lora", "dora", "nara", "nara_dora", "nara_knots", "nara_c", "multi_lora", "tlora")
CONTROLS = ("constant", "shuffled")
"""Those that need a training of their own."""
RANKS = {"text": 1, "images": 1}
"""r of every adapter: the smallest, where LoRA is furthest from full fine-tuning."""
TUNE_DOMAINS = {"text": ("commonsense",), "images": ("house",)}
"""On what learning rates are tried, unless the command says otherwise."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Suite:
    """Attributes:
    name: of the suite.
    backbones, domains: what the methods are compared on, in the order of running.
    tune_domains: on what learning rates are tried.
    others: methods that run on one seed.
    trials: method → the learning rates that tuning tries, equally many for each.
    ablations: (method, its settings), each beside the ones that it has in the main runs.
    ablation_domain: where those run.
    run: job, its settings → its records.
    """

    name: str
    backbones: tuple[str, ...]
    domains: tuple[str, ...]
    tune_domains: tuple[str, ...]
    others: tuple[str, ...]
    trials: Callable[[str], tuple[Settings, ...]]
    ablations: tuple[tuple[str, Settings], ...]
    ablation_domain: str
    run: Callable[[Job, Settings], list[dict[str, Any]]]

    @property
    def methods(self) -> tuple[str, ...]:
        """All that can be run."""
        return (*MUST, *self.others)


def load_suite(name: str) -> Suite:
    """The suite `name`; its models' code is imported only here.

    Raises:
        ValueError: unknown name.
    """
    if name == "text":
        from quality.text.suite import SUITE
    elif name == "images":
        from quality.images.suite import SUITE
    else:
        raise ValueError(f"modality is {name!r}, expected 'text' or 'images'")
    return SUITE
