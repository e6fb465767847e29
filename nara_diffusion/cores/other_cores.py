"""The cores without a hypernetwork: λ (b,) → D = C(λ) − I (b, r, r), in plain torch.

    constant      C = I + η D, one learned D (r, r); an ablation of the paper (NaRA-C)
    identity      C = I: LoRA
    knots         C(λ) = I + η Σ_k φ_k(λ) D_k
                  φ_k(λ) = max(0, 1 − |λ (K − 1) − k|),   k = 0 … K − 1
    rank_mask     C(λ) = diag(1 for i < r(λ), else 0)             (T-LoRA, arXiv 2507.05964)
                  r(λ) = k (⌊(1 − λ)^a (r − r_min) / k⌋ + r_min / k)
    bins          C(λ) = diag(1 for i in block k(λ), else 0)      (Multi-LoRA)
                  k(λ) = min(⌊λ K⌋, K − 1)
    film          C(λ) = diag(γ(λ)), and β(λ) (r,) is added to C(λ) h   (Tc-LoRA, DiffSynth-Studio)
                  γ, β linear in 256 sinusoids of the timestep 1000 λ

Masks have no parameters. A direction that is off adds nothing to the output, and its row of A and
column of B get a gradient of exactly zero. (AdamW still moves directions that it trained before,
until its running mean of gradients has decayed.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .core import Core, CoreInit, Dense, without_autocast

SINUSOIDS = 256
"""The width of film's embedding of λ, which is that of FLUX' timestep."""


class ConstantCore(Core):
    """The core C = I + η D of NaRA-C, with one learnable D (r, r) and no noise input."""

    needs_noise = False

    def __init__(self, rank: int, *, scale: float, init: CoreInit) -> None:
        super().__init__(rank)
        self.scale = scale
        self.deviation = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float32))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.deviation, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """Return η D (1, r, r), float32."""
        return (self.scale * self.deviation.float())[None]


class IdentityCore(Core):
    """The core C = I of plain LoRA; it has no parameters, and layers skip it in the product."""

    needs_noise = False

    def forward(self) -> Tensor:
        """Return zeros (1, r, r), float32."""
        return torch.zeros(1, self.rank, self.rank, dtype=torch.float32)


class KnotsCore(Core):
    """A core that interpolates between learned matrices at K equidistant values of λ.

    This core is not in the paper; see RESULTS.md. C is linear in λ between two knots, and each λ
    trains only the two nearest knots.

    Args:
        rank: r.
        knots: K ≥ 2, the first at λ = 0 and the last at λ = 1.
        scale: η.
    """

    def __init__(self, rank: int, knots: int, *, scale: float) -> None:
        super().__init__(rank)
        self.scale = scale
        self.deviation = nn.Parameter(torch.zeros(knots, rank, rank, dtype=torch.float32))

    def forward(self, noise_level: Tensor) -> Tensor:
        """Return η Σ_k φ_k(λ) D_k (b, r, r), float32, for λ (b,)."""
        knots = len(self.deviation)
        with without_autocast(noise_level.device):
            place = noise_level.float()[:, None] * (knots - 1)  # (b, 1), from 0 to K − 1
            index = torch.arange(knots, device=place.device)
            share = (1 - (place - index).abs()).clamp(min=0)  # (b, K)
            deviation = share @ self.deviation.float().flatten(1)
            return self.scale * deviation.view(-1, self.rank, self.rank)


class RankMaskCore(Core):
    """The core of T-LoRA, which keeps only the first r(λ) of the r directions.

    All directions are on at λ = 0, and `min_rank` of them at λ = 1. Because the paper rounds down,
    the last direction is on only at λ = 0, so masked-diffusion language models never train it.

    Args:
        rank: r.
        min_rank: r_min in [1, r], or None for half of r, at least 1.
        exponent: a > 0; with more than 1, directions go off at a lower λ.
        step: k, which divides r and r_min. Directions go on and off k at a time.
    """

    def __init__(
        self, rank: int, min_rank: int | None = None, exponent: float = 1.0, step: int = 1
    ) -> None:
        super().__init__(rank)
        self.min_rank = max(1, rank // 2) if min_rank is None else min(min_rank, rank)
        self.exponent = exponent
        self.step = step

    def forward(self, noise_level: Tensor) -> Tensor:
        """Return C − I (b, r, r), float32, for λ (b,): −1 for each direction that is off."""
        directions = torch.arange(self.rank, device=noise_level.device)  # (r,)
        is_off = directions >= self.active_rank(noise_level)[:, None]  # (b, r)
        return torch.diag_embed(0 * noise_level.float()[:, None] - is_off.float())

    def active_rank(self, noise_level: Tensor) -> Tensor:
        """Return r(λ) (b,), as a float.

        At λ = t / 1000 with an integer t, this is what T-LoRA's own code computes in float64,
        rounding included. (MPS has no float64.)
        """
        dtype = torch.float32 if noise_level.device.type == "mps" else torch.float64
        timestep = noise_level.to(dtype) * 1000
        integer = timestep.round()
        is_integer = (timestep - integer).abs() < 1e-3  # λ is a fraction in float32
        share = (1000 - torch.where(is_integer, integer, timestep)) / 1000
        steps, least = self.rank // self.step, self.min_rank // self.step
        return self.step * (torch.floor(share**self.exponent * (steps - least)) + least)


class BinsCore(Core):
    """The core of Multi-LoRA, a baseline of the paper, with r / K directions for each of K bins.

    The K bins of λ are equally wide. The directions of a bin form a block, a separate LoRA that is
    trained and used only in its bin. Its scale is lora_alpha / r with the *total* rank r, so
    lora_alpha = K · α scales it by α / (r / K). With DoRA, all blocks share one magnitude.

    Args:
        rank: r, a multiple of `bins`.
        bins: K.
    """

    def __init__(self, rank: int, bins: int) -> None:
        super().__init__(rank)
        self.bins = bins

    def forward(self, noise_level: Tensor) -> Tensor:
        """Return C − I (b, r, r), float32, for λ (b,): −1 for each direction that is off."""
        directions = torch.arange(self.rank, device=noise_level.device)  # (r,)
        block = directions // (self.rank // self.bins)
        is_off = block != self.chosen_bin(noise_level)[:, None]  # (b, r)
        return torch.diag_embed(0 * noise_level.float()[:, None] - is_off.float())

    def chosen_bin(self, noise_level: Tensor) -> Tensor:
        """Return k(λ) (b,), as a float.

        λ is a fraction such as t / 1000 in float32. If λ K is an integer, a few rounding errors,
        each below K · 2⁻²⁴, may leave the computed product just under it. Adding K · 2⁻²¹ corrects
        this; for K below 1000, it is far less than the distance to the next integer.
        """
        share = self.bins * noise_level.float()
        return torch.floor(share + self.bins * 2.0**-21).clamp(max=self.bins - 1)


class FilmCore(Core):
    """The core of Tc-LoRA, diag(γ(λ)) and a vector β(λ) that layers add to C(λ) h.

    The embedding is Diffusers' `Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)` of
    1000 λ. The core starts at γ = 1 and β = 0.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.gamma, self.beta = Dense(SINUSOIDS, rank), Dense(SINUSOIDS, rank)
        nn.init.ones_(self.gamma.bias)

    def forward(self, noise_level: Tensor) -> Tensor:
        """Return diag(γ − 1) with β as a further column, (b, r, r + 1), float32, for λ (b,)."""
        half, device = SINUSOIDS // 2, noise_level.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
        with without_autocast(device):
            exponents = torch.arange(half, dtype=dtype, device=device) / half
            angle = 1000 * noise_level.to(dtype)[:, None] * 10_000**-exponents  # (b, 128)
            embedded = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
            deviation = torch.diag_embed(self.gamma(embedded) - 1)
            return torch.cat([deviation, self.beta(embedded)[..., None]], dim=-1)
