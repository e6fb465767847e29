"""What there is to run, methods × domains × seeds of a suite, and doing it: each job one training, each a few lines.

A method runs with the learning rates that the committed records have of it, in which every method had equally many
trials on a seed and data of their own.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from benchmark_record import provenance
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.training.adapters import CORE_FIELDS
from nara_diffusion.training.optimization import build_lr_scheduler, build_optimizer
from quality import results
from quality.wrong_noise import EVALUATED, GRID, while_evaluating

logger = logging.getLogger(__name__)
Settings = Mapping[str, Any]

RESULTS = Path(__file__).parents[1] / "results"
ASSETS = Path(__file__).parents[2] / "assets"
MAKERS = ASSETS / "makers"
"""Scripts beside each other, no package: who imports one puts this on the path."""
BASE = "base"
"""The backbone as it is."""
SEEDS = (0, 1, 2, 3, 4)
METHODS = ("full", "lora", "dora", "nara", "nara_dora", "nara_knots", "nara_c", "multi_lora", "tlora")
SUITES = ("text", "images", "one_picture")
CONTROLS = ("constant", "shuffled")
"""Those that need a training of their own."""
RANK = 1
"""r of every adapter: the smallest, where LoRA is furthest from full fine-tuning."""


def is_noise_aware(method: str) -> bool:
    """Whether it is a NaRA that reads λ, which the controls are made for."""
    return method.startswith("nara") and method != "nara_c"


@dataclass(frozen=True)
class Job:
    """Attributes: as the records have them; `settings`, beside the learning rates."""

    suite: str
    backbone: str
    domain: str
    method: str
    control: str | None
    seed: int
    settings: Settings = field(default_factory=dict)
    stage: str = "main"

    @property
    def key(self) -> str:
        """The job as text; its records bear it, by which a later call knows that it's done."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def title(self) -> str:
        """For a progress bar."""
        control = f" {self.control}" if self.control else ""
        return f"{self.backbone} {self.domain} {self.method}{control} {self.seed}"


@dataclass(frozen=True)
class Suite:
    """Attributes:
    name: of `SUITES`.
    backbones, domains: what the methods are compared on, in the order of running.
    run: job, its settings → its records.
    methods: those that run by default.
    has_controls: whether methods that read λ are trained with a wrong one, too.
    """

    name: str
    backbones: tuple[str, ...]
    domains: tuple[str, ...]
    run: Callable[[Job, Settings], list[dict[str, Any]]]
    methods: tuple[str, ...] = METHODS
    has_controls: bool = True

    def jobs(
        self,
        backbones: Sequence[str],
        domains: Sequence[str],
        methods: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
    ) -> Iterator[Job]:
        """Seed after seed, so that what a stop leaves behind is complete for the seeds that were reached."""
        for seed, backbone, domain, method in product(seeds, backbones, domains, methods):
            for control in (None, *(CONTROLS if self.has_controls and is_noise_aware(method) else ())):
                yield Job(self.name, backbone, domain, method, control, seed, settings)

    def rates(self, backbone: str, method: str) -> Settings:
        """The learning rates of the method's committed records.

        Raises:
            ValueError: it has none on that backbone.
        """
        from quality.report.data import read_records, select

        records = read_records([RESULTS / f"{self.name}.jsonl"])
        selected = select(records, stage="main", backbone=backbone, method=method)
        if not selected:
            raise ValueError(f"{method} has no committed records on {backbone}: give --set learning_rate=…")
        names = ("learning_rate", "core_learning_rate")
        return {name: selected[0][name] for name in names if selected[0].get(name) is not None}


def load_suite(name: str) -> Suite:
    """The suite of that name; its models' code is imported only here."""
    if name == "text":
        from quality.text.runs import SUITE
    elif name == "one_picture":
        from quality.images.one_picture import SUITE
    else:
        from quality.images.runs import SUITE
    return SUITE


def left_of(jobs: Sequence[Job], path: Path) -> list[Job]:
    """Those of `jobs` whose last record isn't in the file."""
    done = {record["job"] for record in results.read(path) if record.get("last")}
    return [job for job in jobs if job.key not in done]


def run_jobs(suite: Suite, jobs: Sequence[Job], path: Path) -> list[str]:
    """Runs those of `jobs` that `path` doesn't hold; returns what failed, a line each."""
    failures = []
    with tqdm(left_of(jobs, path), unit="run") as bar:
        for job in bar:
            bar.set_description(job.title)
            rates = {} if "learning_rate" in job.settings else suite.rates(job.backbone, job.method)
            try:
                records = suite.run(job, {**rates, **job.settings})
            except ArithmeticError as error:
                failures.append(f"{job.title}: {error}")
                logger.warning(failures[-1])
                continue
            common = {**provenance(), "date": results.now(), "job": job.key}
            last = len(records) - 1
            results.append(path, [{**fields, **common, "last": index == last} for index, fields in enumerate(records)])
    return failures


# ---------------------------------------------------------------------- one run

Arguments = TypeVar("Arguments")
_ADAPTER = CORE_FIELDS - {"core_type"} | {"use_dora", "use_rslora"}


def arguments_of(cls: type[Arguments], values: Settings) -> Arguments:
    """An instance of the dataclass `cls`, a train script's, from flat names: rarer ones go through `adapter_options`.

    Raises:
        ValueError: a name that is no argument, or a value that it refuses.
    """
    plain = {name: value for name, value in values.items() if name not in _ADAPTER}
    core = {name: value for name, value in values.items() if name in _ADAPTER}
    options = plain | ({"adapter_options": core} if core else {})
    unknown = sorted(options.keys() - cls.__dataclass_fields__.keys())  # type: ignore[attr-defined]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no argument of {cls.__name__}.")
    return cls(**options)


def optimize(model: nn.Module, compute_loss: Callable[[int], Tensor], args: Any) -> None:
    """`args.max_train_steps` steps down `compute_loss(number of the step)`, over what in `model` is trainable.

    Raises:
        ArithmeticError: the loss is no longer finite.
    """
    model.train()
    optimizer = build_optimizer(model, args, fused=True)
    schedule = build_lr_scheduler(optimizer, args, args.max_train_steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for number in range(args.max_train_steps):
        loss = compute_loss(number)
        if not loss.isfinite():
            raise ArithmeticError(f"the loss became {loss.item()} in step {number + 1}: lower the learning rate.")
        loss.backward()
        if args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def records_of(
    job: Job,
    args: Any,
    settings: Settings,
    model: nn.Module,
    measure: Callable[[], Settings],
    started: float,
    grid: Tensor = GRID,
    evaluated: Sequence[str] = EVALUATED,
) -> list[dict[str, Any]]:
    """Of a trained model: as it is, and under each control that needs no training of its own.

    Args:
        args: of its training; `settings`, what a record keeps of them beside what it names itself.
        measure: its figures.
        started: when the run began, by `time.perf_counter`.
        grid: λ (n,) over which the mean of C(λ) is taken.
        evaluated: the controls that need no training, of a NaRA.
    """
    is_trained = job.method != BASE
    named = ("rank", "max_train_steps", "learning_rate", "core_learning_rate")
    common = {
        **{name: getattr(job, name) for name in ("suite", "stage", "backbone", "domain", "method", "seed")},
        "learning_rate": args.learning_rate if is_trained else None,
        "core_learning_rate": args.core_learning_rate if job.method.startswith("nara") else None,
        "rank": None if job.method in (BASE, "full") else args.rank,
        "steps": args.max_train_steps if is_trained else 0,
        "settings": {name: value for name, value in settings.items() if is_trained and name not in named},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    records = []
    for control in (job.control, *(evaluated if is_noise_aware(job.method) and job.control is None else ())):
        with while_evaluating(model, control, grid):
            figures = measure()
        seconds = round(time.perf_counter() - started, 2)  # with the records before it
        records.append({**common, "control": control, **figures, "seconds": seconds})
    return records
