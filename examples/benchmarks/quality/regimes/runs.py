"""One run: a regime, an arm, a seed → its record. An arm says what is trained, at which rank, and which λ it reads.

base             nothing: what the others start from
lora_params      LoRA of the smallest rank that has at least as many parameters as NaRA
nara_constant    NaRA, trained and evaluated with λ = 0.5
nara_shuffled    NaRA, trained with the λ of other samples, evaluated with the true one
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from benchmark_record import made_in

from nara_diffusion.training.optimization import is_core_parameter
from quality.images.held_out import pictures_of
from quality.regimes.image_regimes import CONVERSIONS, SUBJECT, UNET, Backbone, Conversion, ReadConversion
from quality.regimes.noise_offset import GainedOffset, Offset, ShiftedOffset
from quality.regimes.text.corruption import MASKED, REPLACED, TOLD, TOLD_AT_START
from quality.regimes.text.data import determined_data, open_data
from quality.regimes.text.denoising import Denoising
from quality.regimes.text.models import BiasedBackbone
from quality.running import BASE, optimize
from quality.wrong_noise import while_evaluating

# ---------------------------------------------------------------------- methods

MEAN_CORE = "mean_core"
"""The ablation that needs no training: the trained adapter with its mean C(λ)."""


@dataclass(frozen=True)
class Arm:
    """Attributes:
    method: of the train scripts' --adapter.
    control: the λ that it is told in training: None, "constant" or "shuffled".
    equal_parameters: whether its rank is that at which it has as many parameters as NaRA.
    """

    method: str
    control: str | None = None
    equal_parameters: bool = False

    @property
    def has_core(self) -> bool:
        """Whether its C depends on λ in evaluation too, so that its mean is an ablation."""
        return self.method in ("nara", "nara_dora", "nara_knots") and self.control is None


ARMS: dict[str, Arm] = {
    BASE: Arm(BASE),
    **{name: Arm(name) for name in ("lora", "dora", "nara", "nara_dora", "nara_knots", "multi_lora", "tlora", "full")},
    "lora_params": Arm("lora", equal_parameters=True),
    "gain": Arm("full"),  # of what noise_offset_gain has beside the base
    "nara_constant": Arm("nara", control="constant"),
    "nara_shuffled": Arm("nara", control="shuffled"),
}


def arm_arguments(
    name: str, *, targets: str, rank: int, steps: int, seed: int, backbone: Backbone = UNET, **rates: float
) -> Any:
    """The arguments of the training of the arm `name`."""
    arm = ARMS[name]
    rank = equal_rank(targets, rank, backbone) if arm.equal_parameters else rank
    options = _settings(arm, targets, rank, backbone) | {"max_train_steps": steps, **rates}
    return backbone.arguments(arm.method, seed, options)


def build(name: str, args: Any, backbone: Backbone = UNET) -> Any:
    """A copy of the base model, as the arm `name` adapts it."""
    return backbone.adapted(ARMS[name].method, args)


@cache
def equal_rank(targets: str, rank: int, backbone: Backbone = UNET) -> int:
    """The smallest rank at which LoRA has at least as many parameters as NaRA of `rank`."""
    counts = {}
    for name, size in (("nara", rank), ("lora", 1)):
        model = build(name, backbone.arguments(name, 0, _settings(ARMS[name], targets, size, backbone)), backbone)
        counts[name] = trainable_parameters(model)
    return math.ceil(counts["nara"] / counts["lora"])


def trainable_parameters(model: Any, of_core: bool = False) -> int:
    """Numbers that are trained, all or those of the core."""
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(count for name, count in trained if not of_core or is_core_parameter(name))


def _settings(arm: Arm, targets: str, rank: int, backbone: Backbone) -> dict[str, Any]:
    if arm.method in (BASE, "full"):
        return {}
    return {"rank": rank, "target_modules": list(backbone.targets[targets])}


# ---------------------------------------------------------------------- runs

DIGITS = 6  # of a figure in a record


class Regime(Protocol):
    """What a run trains, on what, and by what it is measured."""

    @property
    def backbone(self) -> Backbone: ...

    def loss(self, denoiser: Any, args: Any) -> Any: ...

    def figures(self, model: Any) -> dict[str, Any]: ...


REGIMES: dict[str, Regime] = {
    **{name: Conversion(name) for name in CONVERSIONS},
    "subject": Conversion("eps", partial(pictures_of, SUBJECT)),
    "blind_open": Denoising(REPLACED, open_data),
    "blind_determined": Denoising(REPLACED, determined_data),
    "seen_open": Denoising(MASKED, open_data),
    "seen_determined": Denoising(MASKED, determined_data),
}
FURTHER: dict[str, Regime] = {
    **{f"{name}_read": ReadConversion(name) for name in CONVERSIONS},
    "noise_offset": Offset(),
    "noise_offset_gain": GainedOffset(),
    "noise_offset_shift": ShiftedOffset(),
    "blind_open_told": Denoising(TOLD, open_data),
    "blind_open_bias": Denoising(REPLACED, open_data, BiasedBackbone),
    "blind_determined_told": Denoising(TOLD_AT_START, determined_data),
    "blind_determined_bias": Denoising(REPLACED, determined_data, BiasedBackbone),
}
"""Other forms of them, and another: of the alternatives' plan."""


@dataclass(frozen=True)
class Cell:
    """What is compared by itself: in it all arms have the same data, targets and rank, and as many steps.

    Attributes:
        regime: of `REGIMES` or `FURTHER`.
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


def record_of(run: Run, stage: str) -> dict[str, Any]:
    """Trains, measures, and says what it was made with.

    Training that diverges has a record too, whose figures are None.
    """
    provenance = made_in(stage)
    wall, core = time.perf_counter(), time.process_time()
    try:
        figures = _figures(run)
    except ArithmeticError:
        figures = {"score": None, "losses": None}
    seconds, core_seconds = time.perf_counter() - wall, time.process_time() - core
    cost = {"seconds": round(seconds, 1), "core_seconds": round(core_seconds, 1)}
    return {"stage": stage, **run.named, **rounded(figures), **cost, **provenance}


def _figures(run: Run) -> dict[str, Any]:
    """Of the model of `run`, trained.

    Raises:
        ArithmeticError: training diverged.
    """
    arm, regime, cell = ARMS[run.arm], (REGIMES | FURTHER)[run.cell.regime], run.cell
    options = {"targets": cell.targets, "rank": cell.rank, "steps": cell.steps}
    args = arm_arguments(run.arm, **options, seed=run.seed, backbone=regime.backbone, **run.rates)
    torch.manual_seed(run.seed)
    model = build(run.arm, args, regime.backbone)
    if arm.method != BASE:
        denoiser = regime.backbone.controlled(model, arm.control, run.seed)
        optimize(denoiser, regime.loss(denoiser, args), args)
    rank = None if arm.method in (BASE, "full") else args.rank
    with while_evaluating(model, arm.control):
        figures = regime.figures(model)
    if arm.has_core:
        with while_evaluating(model, MEAN_CORE):
            figures[MEAN_CORE] = regime.figures(model)
    sizes = {"trainable_parameters": trainable_parameters(model), "core_parameters": trainable_parameters(model, True)}
    return {**figures, **sizes, "own_rank": rank}


def rounded(value: Any) -> Any:
    """Every float in it to `DIGITS` digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
