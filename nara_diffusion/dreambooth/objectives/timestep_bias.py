"""Some noise levels of a schedule more often than others, as Diffusers' --timestep_bias_strategy has it.

Level i of N, least noise first, is drawn with probability w_i / Σ w, w_i = multiplier for

    earlier   i < ⌊portion · N⌋           little noise
    later     i ≥ N − ⌊portion · N⌋       much noise
    range     begin ≤ i < end

and w_i = 1 for the others. The loss isn't weighted to make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRATEGIES = ("none", "earlier", "later", "range")


@dataclass(frozen=True)
class TimestepBias:
    """See the module's docstring.

    Attributes:
        strategy: one of `STRATEGIES`.
        multiplier: above 0.
        portion: between 0 and 1.
        begin, end: levels; an `end` of None means N.
    """

    strategy: str = "none"
    multiplier: float = 1.0
    portion: float = 0.25
    begin: int = 0
    end: int | None = None

    def weights(self, levels: int) -> Tensor | None:
        """w (N,) float64 for a schedule of N `levels`; None without a bias.

        Raises:
            ValueError: no level is chosen, or all are.
        """
        if self.strategy == "none":
            return None
        count = int(self.portion * levels)
        end = levels if self.end is None else self.end
        first, stop = {
            "earlier": (0, count), "later": (levels - count, levels), "range": (self.begin, end)
        }[self.strategy]  # fmt: skip
        if not 0 <= first < stop <= levels or stop - first == levels:
            flags = "timestep_bias_begin and timestep_bias_end" if self.strategy == "range" else "timestep_bias_portion"
            raise ValueError(
                f"timestep_bias_strategy {self.strategy} chooses the timesteps from {first} to before {stop}, and the "
                f"schedule has {levels}, from 0: choose some of them, and not all, by {flags}."
            )
        weights = torch.ones(levels, dtype=torch.float64)
        weights[first:stop] = self.multiplier
        return weights


NO_BIAS = TimestepBias()
