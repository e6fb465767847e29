"""One run: a regime, an arm, a seed → its record."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from quality import results
from quality.images.controls import while_evaluating
from quality.images.methods import BASE
from quality.images.runs import trainable_parameters
from quality.images.training import ControlledDenoiser, optimize
from quality.regimes.conversion import Conversion
from quality.regimes.methods import ARMS, MEAN_CORE, arm_arguments, build
from quality.regimes.objectives import CONVERSIONS
from quality.regimes.windowed import HIGH, LOW, Windowed

DIGITS = 6  # of a figure in a record


class Regime(Protocol):
    """What a run trains on and is measured by."""

    def loss(self, denoiser: ControlledDenoiser, args: Any, gated: bool = False) -> Any: ...

    def figures(self, unet: Any, gated: bool = False) -> dict[str, Any]: ...


REGIMES: dict[str, Regime] = {
    **{name: Conversion(name) for name in CONVERSIONS},
    "subject_low": Windowed(LOW),
    "subject_high": Windowed(HIGH),
}


@dataclass(frozen=True)
class Cell:
    """What is compared by itself: in it all arms have the same data, targets and rank, and as many steps.

    Attributes:
        regime: of `REGIMES`.
        targets: of `methods.TARGETS`.
        rank, steps: of every arm, if its definition doesn't say otherwise.
    """

    regime: str
    targets: str
    rank: int
    steps: int


@dataclass(frozen=True)
class Run:
    """Attributes:
    cell, arm: what is run.
    seed: of initialisation, order, noise levels and noise.
    rates: learning_rate, and core_learning_rate of a core.
    """

    cell: Cell
    arm: str
    seed: int
    rates: Mapping[str, float]

    @property
    def named(self) -> dict[str, Any]:
        """What a record says of the run, and by which a later call knows that it is done."""
        return {**asdict(self.cell), "arm": self.arm, "seed": self.seed, "rates": dict(self.rates)}


def record_of(run: Run, stage: str, samples: bool = False) -> dict[str, Any]:
    """Trains, measures, and says what it was made with.

    Args:
        samples: draw, and judge what was drawn, in a regime that has it.

    Training that diverges has a record too, whose figures are None.
    """
    wall, core = time.perf_counter(), time.process_time()
    try:
        figures = _trained(run, samples)
    except ArithmeticError:
        figures = {"score": None, "losses": None}
    seconds, core_seconds = time.perf_counter() - wall, time.process_time() - core
    cost = {"seconds": round(seconds, 1), "core_seconds": round(core_seconds, 1)}
    command = shlex.join(["python", *sys.argv])
    made_with = {"date": results.now(), "command": command, **results.provenance()}
    return {"stage": stage, **run.named, **rounded(figures), **cost, **made_with}


def _trained(run: Run, samples: bool) -> dict[str, Any]:
    arm, regime, cell = ARMS[run.arm], REGIMES[run.cell.regime], run.cell
    options = {"targets": cell.targets, "rank": cell.rank, "steps": cell.steps}
    args = arm_arguments(run.arm, **options, seed=run.seed, **run.rates)
    torch.manual_seed(run.seed)
    model = build(run.arm, args)
    if arm.method != BASE:
        denoiser = ControlledDenoiser(model.unet, arm.control).train()
        for _ in optimize(denoiser, regime.loss(denoiser, args, arm.gated), model.adalora, args):
            pass
        model.unet.eval()
    own_rank = None if arm.method in (BASE, "full") else args.rank
    sizes = {"trainable_parameters": trainable_parameters(model), "own_rank": own_rank}
    with while_evaluating(model.unet, arm.control):
        figures = regime.figures(model.unet, arm.gated)
        if samples and isinstance(regime, Conversion):
            figures |= regime.sampled(model.unet, run.seed, trained=arm.method != BASE)
    if arm.has_core:
        with while_evaluating(model.unet, MEAN_CORE):
            figures[MEAN_CORE] = regime.figures(model.unet, arm.gated)
    return {**figures, **sizes}


def rounded(value: Any) -> Any:
    """Every float in it to `DIGITS` digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value
