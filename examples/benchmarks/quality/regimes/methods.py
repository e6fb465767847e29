"""The arms of a comparison: what each name trains, at which rank, and which λ it is told.

base             nothing: what the others start from; its samples are drawn with its own scheduler
lora_params      LoRA of the smallest rank that has at least as many parameters as NaRA
nara_constant    NaRA, trained and evaluated with λ = 0.5
nara_shuffled    NaRA, trained with the λ of other samples, evaluated with the true one
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from quality.images.methods import BASE
from quality.regimes.backbones import UNET, Backbone

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
    for name, each in (("nara", rank), ("lora", 1)):
        model = build(name, backbone.arguments(name, 0, _settings(ARMS[name], targets, each, backbone)), backbone)
        counts[name] = trainable_parameters(model)
    return math.ceil(counts["nara"] / counts["lora"])


def trainable_parameters(model: Any) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _settings(arm: Arm, targets: str, rank: int, backbone: Backbone) -> dict[str, Any]:
    if arm.method in (BASE, "full"):
        return {}
    return {"rank": rank, "target_modules": list(backbone.targets[targets])}
