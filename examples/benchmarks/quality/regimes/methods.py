"""The arms of a comparison: what each name trains, at which rank, and which λ it is told.

base             nothing: what the others start from; its samples are drawn with its own scheduler
lora_params      LoRA of the smallest rank that has at least as many parameters as NaRA
nara_constant    NaRA, trained and evaluated with λ = 0.5
nara_shuffled    NaRA, trained with the λ of other samples, evaluated with the true one
nara_diagonal    MultiAlign's γ: a gain of each direction and layer, linear in a sinusoid of λ
lora_switched    two LoRAs of the cell's rank, one below λ = 0.5 and one above (regime "two conditions")
lora_gated           LoRA, trained inside the window alone and switched off outside (regime "windowed")
lora_gated_samples   the same with half of the steps: as many samples of the window as the other arms have
nara_gated, nara_gated_samples   the same with NaRA
lora_less_noisy  LoRA that meets noise levels below 0.5 four times as often as those above (regime "one image")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion import register_core
from quality.images.methods import BASE
from quality.regimes.backbones import UNET, Backbone

MEAN_CORE = "mean_core"
"""The ablation that needs no training: the trained adapter with its mean C(λ)."""

DIAGONAL = {"core_type": "multialign", "core_sharing": "layer", "noise_embedding_dim": 256}
LESS_NOISY = {"timestep_bias_strategy": "earlier", "timestep_bias_portion": 0.5, "timestep_bias_multiplier": 4.0}


class DiagonalCore(nn.Module):
    """C(λ) = diag(W e(λ) + b), e(λ) = [cos(1000 λ ω), sin(1000 λ ω)], ω_i = 10000^(−2 i / d) for i < d / 2.

    W (r, d) starts at zero and b (r,) at one, so that C = I at step 0.
    """

    def __init__(self, config: Any, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank, config.noise_embedding_dim))
        self.bias = nn.Parameter(torch.ones(rank))

    def forward(self, noise_level: Tensor) -> Tensor:
        """λ (b,) → C (b, r, r)."""
        half = self.weight.shape[1] // 2
        omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=noise_level.device) / half)
        angles = 1000 * noise_level[:, None].double() * omega  # (b, d / 2)
        e = torch.cat([angles.cos(), angles.sin()], dim=1).float()  # (b, d)
        return torch.diag_embed(e @ self.weight.T + self.bias)


register_core("multialign", DiagonalCore)


@dataclass(frozen=True)
class Arm:
    """Attributes:
    method: of the train scripts' --adapter.
    control: the λ that it is told in training: None, "constant" or "shuffled".
    equal_parameters: whether its rank is that at which it has as many parameters as NaRA.
    gated: whether it exists inside the window alone.
    share: of the cell's steps that it has.
    options: further arguments of its training.
    """

    method: str
    control: str | None = None
    equal_parameters: bool = False
    gated: bool = False
    share: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

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
    "nara_diagonal": Arm("nara", options=DIAGONAL),
    "lora_gated": Arm("lora", gated=True),
    "lora_switched": Arm("multi_lora", options={"core_bins": 2}),
    "nara_gated": Arm("nara", gated=True),
    "lora_less_noisy": Arm("lora", options=LESS_NOISY),
    "lora_gated_samples": Arm("lora", gated=True, share=0.5),
    "nara_gated_samples": Arm("nara", gated=True, share=0.5),
}


def arm_arguments(
    name: str, *, targets: str, rank: int, steps: int, seed: int, backbone: Backbone = UNET, **rates: float
) -> Any:
    """The arguments of the training of the arm `name`."""
    arm = ARMS[name]
    rank = equal_rank(targets, rank, backbone) if arm.equal_parameters else rank
    options = _settings(arm, targets, rank, backbone) | {"max_train_steps": round(arm.share * steps), **rates}
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
    return {"rank": rank, "target_modules": list(backbone.targets[targets]), **arm.options}
