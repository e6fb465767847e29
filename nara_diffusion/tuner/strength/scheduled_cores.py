"""The cores of an adapter whose strength depends on λ: its layers read s(λ) · C(λ) as their core.

Layers of one core may have several strengths, e.g. one for each block of a UNet. Then each strength has its own name,
by which its layers read, and the core itself is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from nara_diffusion.noise.signals import NoiseSignals
from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.runtime.offloading import compute_device
from nara_diffusion.tuner.holder.core_set import CoreSet


class ScaledCore(NamedTuple):
    """The core of a group, times the strength of a schedule; None is 1."""

    group: str
    schedule: StrengthSchedule | None


Strengths = Mapping[str, ScaledCore]
"""The name by which layers read → the scaled core that they get."""


class ScheduledCores:
    """Replaces the `CoreSet` of one adapter in a forward of the model and in merging.

    Args:
        cores: the cores of the adapter. strengths: of all layers that read one of them.
    """

    needs_noise = True

    def __init__(self, cores: CoreSet, strengths: Strengths) -> None:
        self.cores = cores
        self.strengths = strengths

    @property
    def needs_density(self) -> bool:
        return self.cores.needs_density

    @property
    def groups(self) -> list[str]:
        """The names by which layers read."""
        return list(self.strengths)

    def at(self, signals: NoiseSignals | None) -> dict[str, Tensor]:
        """Name → s C (b or 1, r, r)."""
        found = self.cores.at(signals)
        for group in {scaled.group for scaled in self.strengths.values()} - found.keys():
            found[group] = self.cores.matrix(group, signals)  # an identity
        return {name: self._scaled(found[of.group], of.schedule, signals) for name, of in self.strengths.items()}

    def matrix(self, name: str, signals: NoiseSignals | None) -> Tensor:
        """s C (b or 1, r, r) of one name."""
        group, schedule = self.strengths[name]
        return self._scaled(self.cores.matrix(group, signals), schedule, signals)

    def _scaled(self, core: Tensor, schedule: StrengthSchedule | None, signals: NoiseSignals | None) -> Tensor:
        if schedule is None:
            return core
        assert signals is not None
        level = signals.noise_level
        device = compute_device(self.cores) or level.device  # an identity has no weights
        return schedule.at(level.to(device))[:, None, None] * core.to(device)
