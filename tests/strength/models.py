"""Adapted layers of every kind whose strength depends on λ, and the strength by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import StrengthSchedule, noise_level, set_strength
from nara_diffusion.noise.level import find_holders
from tests.helpers.adapted import TwoLayers, default_core, disturb, lora_config, nara_config

POINTS = [(0.1, 1.5), (0.4, -0.5), (0.8, 0.2)]
SCHEDULE = StrengthSchedule(POINTS)
LEVELS = torch.tensor([0.05, 0.33, 0.93])

OTHER = StrengthSchedule([(0, 0.4), (1, 1.2)])
TARGETS = ["first", "second"]
BOTH = pytest.mark.parametrize("kind", ["LoRA", "NaRA"])

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


def model_of(kind: str, **options: Any) -> PeftModel:
    torch.manual_seed(7)
    return adapted_by(kind, TwoLayers(), target_modules=TARGETS, **options)


def with_two(kind: str) -> PeftModel:
    """Adapters "default" and "other", of which the second one adapts one layer alone."""
    model = model_of(kind)
    model.add_adapter("other", (lora_config if kind == "LoRA" else nara_config)(target_modules=["first"], r=3))
    disturb(model, seed=4)
    return model


def at(model: nn.Module, x: Tensor, levels: Any = LEVELS, **options: Any) -> Tensor:
    with noise_level(model, levels), torch.no_grad():
        return model(x, **options)


def by_numbers(model: Any, x: Tensor, schedules: dict[str, Any], levels: Tensor = LEVELS) -> Tensor:
    """The output of a copy, one sample at a time, whose adapters have the numbers that the schedules say."""
    clone, rows = copy.deepcopy(model), []
    for i, level in enumerate(levels):
        for name, schedule in schedules.items():
            set_number(clone, name, schedule(level).item())
        with torch.no_grad():
            if find_holders(clone):
                with noise_level(clone, level.item()):
                    rows.append(clone(x[i : i + 1]))
            else:
                rows.append(clone(x[i : i + 1]))
    return torch.cat(rows)


def set_number(model: Any, name: str, number: float) -> None:
    """The strength of an adapter without a schedule."""
    set_strength(model, name, None)
    set_strength(model, name, number)


def trace(model: nn.Module) -> dict[str, Any]:
    """All that a strength may change in a model."""
    return {
        name: (
            type(module).__name__,
            {k: (type(v), getattr(v, "key", None)) for k, v in getattr(module, "lora_variant", {}).items()},
            dict(getattr(module, "scaling", {})),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            sorted(module.__dict__),
        )
        for name, module in model.named_modules()
    }
