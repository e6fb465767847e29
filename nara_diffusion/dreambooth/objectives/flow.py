"""A rectified flow (arXiv 2209.03003), λ = σ, the denoiser's timestep N σ:

    x_σ = (1 − σ) x + σ ε;   target  ε − x ("flow_prediction");   x̂ = x_σ − σ · prediction
    σ = s u / (1 + (s − 1) u),  u = 1/N, 2/N, …, 1,  shifted by s, 1 as a rule
    SNR = (1 − σ)² / σ², so that min-SNR-γ is  σ² min(SNR, γ) = min((1 − σ)², γ σ²)

Without γ an error at σ counts what `density` has for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nara_diffusion.noise.timesteps import TimestepNoise

from .density import UNIFORM, TimestepDensity
from .terms import Corrupted, column


class FlowObjective:
    """See the module's docstring.

    Args:
        snr_gamma: γ of min-SNR weights; None weights all σ alike.
        levels: N, how many σ there are; those of Diffusers' flow schedulers by default.
        shift: s; 1 leaves the σ equally spaced.
        density: see the module's docstring.
    """

    prediction_type = "flow_prediction"

    def __init__(
        self,
        snr_gamma: float | None = None,
        levels: int = 1000,
        shift: float = 1.0,
        density: TimestepDensity = UNIFORM,
    ) -> None:
        self.snr_gamma = snr_gamma
        self.levels = levels
        self.source = TimestepNoise("sigma_1000", num_train_timesteps=levels)
        u = torch.arange(1, levels + 1, dtype=torch.float64) / levels
        self.sigmas = shift * u / (1 + (shift - 1) * u)  # (N,)
        self.density = density

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        """`indices` (b,) into the σ, least noise first."""
        sigma = self.sigmas.to(latents.device)[indices]  # (b,)
        return Corrupted(
            model_input=column(1 - sigma) * latents + column(sigma) * noise,
            timestep=(self.levels * sigma).float(),
            target=noise - latents,
            weight=self._weight(sigma),
        )

    def _weight(self, sigma: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return self.density.loss_weight(sigma)
        return torch.minimum((1 - sigma) ** 2, self.snr_gamma * sigma**2).float()
