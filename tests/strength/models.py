"""Adapted layers of every kind whose strength depends on λ, and the strength by hand."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import StrengthSchedule
from tests.helpers.adapted import default_core, disturb, lora_config, nara_config

POINTS = [(0.1, 1.5), (0.4, -0.5), (0.8, 0.2)]
SCHEDULE = StrengthSchedule(POINTS)
LEVELS = torch.tensor([0.05, 0.33, 0.93])

ADAPTERS: dict[str, Any] = {
    "LoRA": lora_config,
    "identity": lambda **options: nara_config(core_type="identity", **options),
    "NaRA": nara_config,
    "NaRA-C": lambda **options: nara_config(core_type="constant", **options),
    "T-LoRA": lambda **options: nara_config(core_type="rank_mask", **options),
    "knots a layer": lambda **options: nara_config(core_type="knots", core_sharing="layer", **options),
}


def adapted_by(kind: str, model: nn.Module, **options: Any) -> PeftModel:
    """`model` with one disturbed adapter of that kind, in evaluation mode."""
    peft_model = get_peft_model(model, ADAPTERS[kind](**options))
    disturb(peft_model)
    return peft_model.eval()


def strength_by_hand(levels: Tensor) -> Tensor:
    """SCHEDULE (b,), in float64, piece by piece."""
    found = []
    for level in levels.double().tolist():
        if level <= 0.1:
            found.append(1.5)
        elif level <= 0.4:
            found.append(1.5 + (level - 0.1) / 0.3 * -2.0)
        elif level <= 0.8:
            found.append(-0.5 + (level - 0.4) / 0.4 * 0.7)
        else:
            found.append(0.2)
    return torch.tensor(found, dtype=torch.float64)


def core_at(model: PeftModel, kind: str, levels: Tensor, group: str = "shared") -> Tensor:
    """s(λ) C(λ) (b, r, r) in float64."""
    if kind in ("LoRA", "identity"):
        core = torch.eye(4, dtype=torch.float64).expand(len(levels), -1, -1)
    else:
        core = default_core(model, levels, group=group)
    return strength_by_hand(levels)[:, None, None] * core
