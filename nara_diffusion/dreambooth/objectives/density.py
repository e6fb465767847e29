"""How often each noise level of a rectified flow is drawn, and what it counts: Diffusers' --weighting_scheme.

    scheme          u in [0, 1); 1 − u is σ before the schedule is shifted        weight of the error at σ
    none            uniform                                                       1
    logit_normal    ln u / (1 − u) ~ N(m, s²)                                     1
    mode            u = 1 − v − k (cos² πv/2 − 1 + v), v uniform                  1
    cosmap          uniform                                                       2 / (π (1 − 2σ + 2σ²))
    sigma_sqrt      uniform                                                       σ⁻²

Section 3.1 of the paper on Stable Diffusion 3 has these distributions (arXiv 2403.03206), there with u = 1 as noise.
Diffusers' scripts, whose flag this is, count their timesteps from the noisy end, and so does this: m > 0 means less
noise. Level i of N, least noise first, is drawn with the probability of i / N ≤ 1 − u < (i + 1) / N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTING = ("cosmap", "sigma_sqrt")
SCHEMES = ("none", "logit_normal", "mode", *WEIGHTING)
LARGEST_MODE_SCALE = 2 / (math.pi - 2)
"""k beyond which, and below −1, u would not fall as v grows."""


@dataclass(frozen=True)
class TimestepDensity:
    """See the module's docstring.

    Attributes:
        scheme: one of `SCHEMES`.
        mean, std: m and s of "logit_normal".
        scale: k of "mode".
    """

    scheme: str = "none"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29

    def weights(self, levels: int) -> Tensor | None:
        """The probability of each of N `levels`, (N,) float64; None where all have the same."""
        if self.scheme not in ("logit_normal", "mode"):
            return None
        edges = torch.arange(levels + 1, dtype=torch.float64) / levels  # (N + 1,)
        if self.scheme == "logit_normal":
            below = torch.special.ndtr((torch.logit(edges) + self.mean) / self.std)
        else:
            below = 1 - self._mode_argument(edges)  # u and 1 − u are distributed alike
        return below.diff()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return the weight of an error at σ (b,), (b,) float32."""
        if self.scheme == "cosmap":
            return (2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))).float()
        if self.scheme == "sigma_sqrt":
            return (sigma**-2).float()
        return torch.ones_like(sigma, dtype=torch.float32)

    def _mode_argument(self, u: Tensor) -> Tensor:
        """v of u, by bisection: u falls as v grows."""
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(60):
            v = (low + high) / 2
            above = 1 - v - self.scale * (torch.cos(math.pi * v / 2) ** 2 - 1 + v) > u
            low, high = torch.where(above, v, low), torch.where(above, high, v)
        return (low + high) / 2


UNIFORM = TimestepDensity()
