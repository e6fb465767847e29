"""D(λ) = C(λ) − I of a model's adapters, times their strengths over λ.

    D' = σ(λ) C(λ) − I = σ D + (σ − 1) I        for an adapter with a strength σ

D is (b or 1, r, r), float32, for λ (b,).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.cores.core import CoreSet, IdentityCore
from nara_diffusion.layers.channel import Key
from nara_diffusion.noise.strength_schedule import StrengthSchedule


@dataclass(eq=False)
class Deviations:
    """Compute D(λ) of the adapters of one model.

    The holder of the cores owns both dicts and changes them in place.

    Args:
        cores: adapter → its cores.
        schedules: adapter → its strength over λ, if it has one.
    """

    cores: nn.ModuleDict
    schedules: dict[str, StrengthSchedule]

    def cores_of(self, name: str) -> CoreSet:
        """Return group → core of an adapter."""
        cores = self.cores[name]
        assert isinstance(cores, CoreSet)
        return cores

    def depends_on_noise(self, name: str) -> bool:
        """Return True if the adapter has cores here, and a core or its strength needs λ."""
        if name not in self.cores:
            return False
        return name in self.schedules or self.cores_of(name).needs_noise

    def noisy(self, names: Iterable[str]) -> list[str]:
        """Return the adapters in `names` that depend on λ."""
        return list(filter(self.depends_on_noise, names))

    def of(self, names: Iterable[str], level: Tensor | None) -> dict[Key, Tensor]:
        """Return key → D (b or 1, r, r) for these adapters, except where layers treat C as I."""
        found = {}
        for name in names:
            for group, core in self.cores_of(name).items():
                if name in self.schedules or not isinstance(core, IdentityCore):
                    found[name, group] = self.at((name, group), level)
        return found

    def at(self, key: Key, level: Tensor | None) -> Tensor:
        """Return D (b or 1, r, r), float32, for the layers with this key.

        It includes the adapter's strength.
        """
        name, group = key
        D = self.cores_of(name).deviation(group, level)
        schedule = self.schedules.get(name)
        if schedule is None:
            return D
        assert level is not None
        if D.device.type == "cpu":
            D = D.to(level.device)  # an identity has no weights
        strength = schedule.at(level.to(D.device))[:, None, None]
        identity = torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)
        return strength * D + (strength - 1) * identity

    def matrix(self, key: Key, level: Tensor | None) -> Tensor:
        """Return C (b or 1, r, r) times the strength, float32, for export."""
        D = self.at(key, level)
        return torch.eye(D.shape[-1], dtype=D.dtype, device=D.device) + D


def beside_inputs(
    deviations: dict[Key, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Key, Tensor]:
    """Move D from the CPU to the device of the forward's first tensor, once for all layers."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            break
    else:
        return deviations
    if value.device.type == "cpu":
        return deviations
    moved = {}
    for key, D in deviations.items():
        moved[key] = D.to(value.device) if D.device.type == "cpu" else D
    return moved
