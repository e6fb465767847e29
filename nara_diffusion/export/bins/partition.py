"""Step functions φ_k, 1 in one part of [0, 1] and 0 elsewhere: one LoRA at a time, the mean of C over its part.

The parts are the best on the grid, found by dynamic programming with cost(i, j) of a part from point i to point j:

    best(k, j) = min over i of best(k − 1, i − 1) + cost(i, j)          max in place of + for the worst error
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nara_diffusion.noise.strength import StrengthSchedule

from .core_samples import Blend, CoreSamples


def constant_blends(samples: CoreSamples, worst: bool) -> Iterator[Blend]:
    """Yield the best blends of 1, 2, 3 … LoRAs, by the worst error over λ, or else by the mean square."""
    costs = _costs(samples, worst)  # (n, n), from the row's point to the column's
    total, firsts = costs[0], []
    for _ in range(len(costs)):
        yield _blend(samples, _edges(firsts, len(costs) - 1))
        before = torch.cat([total.new_full((1,), torch.inf), total[:-1]])[:, None]
        total, first = (torch.maximum(before, costs) if worst else before + costs).min(0)
        firsts.append(first)


def _costs(samples: CoreSamples, worst: bool) -> Tensor:
    """The cost of each part (i, j): the largest ‖ΔW − mean‖² in it, or their weighted sum; ∞ below the diagonal."""
    M, w = samples.products, samples.floored
    n = len(w)
    costs = M.new_full((n, n), torch.inf)
    for i in range(n):
        inside, weights = M[i:, i:], w[i:]
        sums = weights.cumsum(0)  # (m,), of the parts that end at each point
        rows = (inside * weights).cumsum(1)  # (m, m): Σ_j w_j M_kj up to each end
        means = (rows * weights[:, None]).cumsum(0).diagonal() / sums**2
        errors = inside.diagonal()[:, None] - 2 * rows / sums + means  # (m, m): of each point, by end
        errors = errors.clamp(min=0).triu()
        costs[i, i:] = errors.amax(0) if worst else (errors * weights[:, None]).sum(0)
    return costs


def _edges(firsts: list[Tensor], last: int) -> list[int]:
    """The first point of each part."""
    found = []
    for first in reversed(firsts):
        found.append(int(first[last]))
        last = found[-1] - 1
    return [0, *reversed(found)]


def _blend(samples: CoreSamples, edges: list[int]) -> Blend:
    levels = samples.levels.tolist()
    steps = [_between(levels[edge - 1], levels[edge]) for edge in edges[1:]]
    schedules = [StrengthSchedule(_rise(low) + _fall(high)) for low, high in pairwise([None, *steps, None])]
    middles = [(low + high) / 2 for low, high in pairwise([0.0, *steps, 1.0])]
    return samples.fitted(schedules, middles)


def _rise(step: float | None) -> list[tuple[float, float]]:
    return [(0.0, 1.0)] if step is None else [(step, 0.0), (step, 1.0)]


def _fall(step: float | None) -> list[tuple[float, float]]:
    return [] if step is None else [(step, 1.0), (step, 0.0)]


def _between(low: float, high: float) -> float:
    """The middle of `low` and `high` in float32, above `low`."""
    middle = float(np.float32((low + high) / 2))
    return middle if middle > low else high
