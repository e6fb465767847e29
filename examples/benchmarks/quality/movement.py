"""How a core moves while it is trained: how far C(λ) is from I, how much of that depends on λ, and what pulls at it.

    deviation = mean over λ and layers of ‖C(λ) − I‖_F / √r
    spread    = mean over λ and layers of ‖C(λ) − C̄‖_F / √r,      C̄ the mean of C(λ) over λ
    agreement = mean cosine between the gradients that two layers send to C, where each layer has a core of its own

A spread much below the deviation means a constant matrix with a ripple: NaRA-C. An agreement near zero means that a
core shared by all layers is pulled by each of them another way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.noise.signals import as_signals
from nara_diffusion.runtime.modules import core_holders
from nara_diffusion.training.optimization import CORE_MARK

LEVELS = torch.linspace(0.025, 0.975, 20)


@torch.no_grad()
def shape_of_core(model: nn.Module) -> dict[str, float]:
    """deviation, spread, and the smallest and largest singular value of any C(λ); of the adapter "default"."""
    (holder,) = core_holders(model)
    cores = holder.cores["default"]
    C = torch.stack([cores.matrix(group, as_signals(LEVELS)).expand(len(LEVELS), -1, -1) for group in cores.groups])
    rank = C.shape[-1]
    size = lambda matrix: matrix.flatten(-2).norm(dim=-1).mean().item() / rank**0.5  # noqa: E731
    singular = torch.linalg.svdvals(C)
    return {
        "deviation": size(C - torch.eye(rank)),
        "spread": size(C - C.mean(1, keepdim=True)),
        "smallest_singular_value": singular.min().item(),
        "largest_singular_value": singular.max().item(),
    }


def pull_on(model: nn.Module) -> dict[str, float]:
    """Root mean squares of the gradients that A, B and the core have now, and of B itself."""
    groups: dict[str, list[Tensor]] = {"core": [], "A": [], "B": []}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kind = "core" if CORE_MARK in name else "A" if "lora_A" in name else "B" if "lora_B" in name else ""
            groups.get(kind, []).append(parameter)
    figures = {f"gradient_{kind}": _rms([p.grad for p in own if p.grad is not None]) for kind, own in groups.items()}
    return figures | {"size_B": _rms([p.detach() for p in groups["B"]])}


def agreement(model: nn.Module) -> float | None:
    """Mean cosine of the core's gradients over pairs of layers; None where they share one core."""
    own = [p.grad.flatten() for name, p in model.named_parameters() if CORE_MARK in name and p.grad is not None]
    if len({gradient.numel() for gradient in own}) != 1 or len(own) < 2:
        return None
    unit = torch.nn.functional.normalize(torch.stack(own), dim=1)
    unit = unit[unit.norm(dim=1) > 0]
    cosines = unit @ unit.T
    return cosines[~torch.eye(len(unit), dtype=torch.bool)].mean().item() if len(unit) > 1 else None


def _rms(tensors: list[Tensor]) -> float:
    count = sum(tensor.numel() for tensor in tensors)
    return (sum(tensor.double().square().sum().item() for tensor in tensors) / count) ** 0.5 if count else 0.0


def look(model: nn.Module, step: int) -> dict[str, Any]:
    """All of it, after the backward of a step."""
    return {"step": step, **shape_of_core(model), **pull_on(model), "agreement": agreement(model)}
