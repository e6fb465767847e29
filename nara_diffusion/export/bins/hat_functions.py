"""Hat functions φ_k, linear between knots: 1 at their own knot, 0 at the others.

Neighbouring knots with the same C share one φ, which is 1 from the first to the last. Knots are placed uniformly, or
one after the other where the error is largest, beginning with the breakpoints or with 0 and 1. Of these placements the
one with the smallest error after the least-squares fit is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, repeat

import torch

from nara_diffusion.noise.strength import StrengthSchedule

from .breakpoints import as_levels
from .core_samples import Blend, CoreSamples


def exact_blend(samples: CoreSamples) -> Blend:
    """The blend with C at the breakpoints and linear between them, which is exact for knots and masks."""
    return samples.sampled(*_hats(samples, samples.breakpoints))


def linear_blends(samples: CoreSamples, worst: bool) -> Iterator[Blend]:
    """Yield the best blends of 1, 2, 3 … LoRAs, by the worst error over λ, or else by the mean square."""
    ends = [0, len(samples.levels) - 1]
    grown = [
        _grown(samples, start) for start in ([ends] if samples.breakpoints == ends else [samples.breakpoints, ends])
    ]
    for number in count(1):
        placements = [_uniform(samples, number), *(knots for each in grown if (knots := next(each)) is not None)]
        blends = [_fitted(samples, placement) for placement in placements]
        yield min(blends, key=lambda blend: blend.error.worst_update if worst else blend.error.mean_update)


def _uniform(samples: CoreSamples, number: int) -> list[int]:
    wanted = torch.linspace(0, 1, number, dtype=torch.float32) if number > 1 else as_levels([0.5])
    return (samples.levels[:, None] - wanted).abs().argmin(0).tolist()


def _grown(samples: CoreSamples, knots: list[int] | None) -> Iterator[list[int] | None]:
    """Yield the knots of 1, 2, 3 … φ; None where there are none."""
    number = 1
    while knots is not None:
        runs = len(_runs(samples, knots))
        if runs < number:
            knots = _with_the_worst(samples, knots)
        else:
            yield knots if runs == number else None
            number += 1
    yield from repeat(None)


def _with_the_worst(samples: CoreSamples, knots: list[int]) -> list[int] | None:
    """Add a knot where the interpolation of C is farthest from C(λ); None if it is exact."""
    errors = torch.tensor(samples.sampled(*_hats(samples, knots)).error.update)
    errors[knots] = 0
    return sorted([*knots, int(errors.argmax())]) if errors.any() else None


def _fitted(samples: CoreSamples, knots: list[int]) -> Blend:
    schedules, chosen = _hats(samples, knots)
    return samples.fitted(schedules, samples.levels[chosen].tolist())


def _hats(samples: CoreSamples, knots: list[int]) -> tuple[list[StrengthSchedule], list[int]]:
    """The φ of each run of knots, and the first point of each run."""
    levels = samples.levels[knots].tolist()
    runs = _runs(samples, knots)
    return [_hat(levels, run) for run in runs], [knots[run[0]] for run in runs]


def _runs(samples: CoreSamples, knots: list[int]) -> list[list[int]]:
    """The indices of the knots, grouped into runs of equal C."""
    runs = [[0]]
    for index in range(1, len(knots)):
        if samples.same(knots[index - 1], knots[index]):
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _hat(levels: list[float], run: list[int]) -> StrengthSchedule:
    """The schedule that is 1 on the run, and 0 up to the λ before it and from the λ after it."""
    first, last = run[0], run[-1]
    before = [(levels[first - 1], 0.0)] if first > 0 else []
    inside = [(levels[index], 1.0) for index in dict.fromkeys((first, last))]
    after = [(levels[last + 1], 0.0)] if last + 1 < len(levels) else []
    return StrengthSchedule([*before, *inside, *after])
