"""The noise levels between which the cores of an adapter are linear in λ, or constant.

    knots        at the knots, k / (K − 1)                    straight between them
    bins         on both sides of each step of a mask         constant between them
    rank_mask    the same
    a strength   at its points, on both sides of its steps

Other cores have none but 0 and 1. The two sides of a step are neighbouring float32 numbers, since λ is float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nara_diffusion.noise.signals import NoiseSignals
from nara_diffusion.tuner.config import NaraConfig
from nara_diffusion.tuner.holder.build_core import is_tied_to_rank

from ..adapted_layers import Adapter

_SCAN = 4097


def breakpoints(adapter: Adapter) -> list[float]:
    """The breakpoints of the adapter in ascending order, 0 and 1 included."""
    config: Any = adapter.config
    found = {0.0, 1.0, *_of_strengths(adapter)}
    if isinstance(config, NaraConfig) and config.core_type == "knots":
        found |= {_float32(knot / (config.core_knots - 1)) for knot in range(config.core_knots)}
    if isinstance(config, NaraConfig) and is_tied_to_rank(config):
        found |= set(_steps(adapter))
    return sorted(found)


def _of_strengths(adapter: Adapter) -> list[float]:
    holder = adapter.holder
    scaled = {} if holder is None else holder.strengths.get(adapter.name, {})
    found = []
    for schedule in {each.schedule for each in scaled.values() if each.schedule is not None}:
        levels = [_float32(level) for level, _ in schedule.points]
        steps = [level for level, following in pairwise(levels) if level == following]
        found += [*levels, *(_before(step) for step in steps if step > 0)]
    return found


def _steps(adapter: Adapter) -> list[float]:
    """Both sides of each λ at which a mask changes."""
    scan = torch.linspace(0, 1, _SCAN, dtype=torch.float32)
    changes = torch.zeros(_SCAN - 1, dtype=torch.bool)
    for core in _masks(adapter, scan):
        changes |= (core[1:] != core[:-1]).flatten(1).any(1)
    found = []
    for index in changes.nonzero().flatten().tolist():
        found += _sides(adapter, float(scan[index]), float(scan[index + 1]))
    return found


def _sides(adapter: Adapter, below: float, above: float) -> tuple[float, float]:
    """The last λ with the mask of `below`, and the next float32 after it, by bisection."""
    while True:
        middle = _float32((below + above) / 2)
        if middle in (below, above):
            return below, above
        same = all(torch.equal(core[0], core[1]) for core in _masks(adapter, as_levels([below, middle])))
        below, above = (middle, above) if same else (below, middle)


def _masks(adapter: Adapter, levels: Tensor) -> list[Tensor]:
    """C (n, r, r) of each group of layers, without a strength."""
    assert adapter.holder is not None
    cores: Any = adapter.holder.cores[adapter.name]
    return list(cores.at(NoiseSignals(levels)).values())


def _float32(level: float) -> float:
    return float(np.float32(level))


def _before(level: float) -> float:
    return float(np.nextafter(np.float32(level), np.float32(0)))


def as_levels(levels: list[float]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32)
