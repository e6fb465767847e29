"""Discrete schedules, ᾱ_t from the scheduler, λ = t / N:

    x_t = √ᾱ x + √(1 − ᾱ) ε;   target  ε ("epsilon"),  v = √ᾱ ε − √(1 − ᾱ) x ("v_prediction"),  x ("sample")

With min-SNR-γ (arXiv 2303.09556), SNR = ᾱ / (1 − ᾱ), the squared error in x counts min(SNR, γ), which is
min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v and min(SNR, γ) for x.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from nara_diffusion.noise.timesteps import TimestepNoise

from .terms import Corrupted, column

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DiscreteObjective:
    """See the module's docstring.

    Args:
        scheduler: the pipeline's.
        snr_gamma: γ of min-SNR weights; None weights all timesteps alike.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.prediction_type = checked_prediction_type(scheduler, PREDICTION_TYPES)
        self.snr_gamma = snr_gamma
        training: Any = DDPMScheduler.from_config(scheduler.config)
        self.alphas: Tensor = training.alphas_cumprod.double()  # ᾱ (N,)
        self.levels = len(self.alphas)
        self.source = TimestepNoise("discrete", num_train_timesteps=self.levels)

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        """`indices` (b,) are timesteps."""
        alphas = self.alphas.to(latents.device)[indices]  # (b,)
        signal, sigma = column(alphas.sqrt()), column((1 - alphas).sqrt())  # (b, 1, 1, 1)
        targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * latents, "sample": latents}
        return Corrupted(
            model_input=signal * latents + sigma * noise,
            timestep=indices,
            target=targets[self.prediction_type],
            weight=self._weight(alphas),
        )

    def _weight(self, alphas: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones_like(alphas, dtype=torch.float32)
        snr = alphas / (1 - alphas)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.prediction_type == "epsilon":
            # min(SNR, γ) / SNR, at SNR = 0 too: the last timestep of a schedule with zero terminal SNR
            return (self.snr_gamma / snr).clamp(max=1).float()
        return (clipped / (snr + 1) if self.prediction_type == "v_prediction" else clipped).float()


def checked_prediction_type(scheduler: Any, known: tuple[str, ...]) -> str:
    """Return the prediction type of a scheduler with betas, or of EDM's; raise ValueError for an unknown one."""
    config = scheduler.config
    if not {"beta_schedule", "sigma_data"} & set(config):
        raise ValueError(
            f"{type(scheduler).__name__} has no noise schedule that SDXL is trained with: expected one "
            "with betas, or an EDM one."
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in known:
        raise ValueError(f"the scheduler's prediction_type is {prediction_type!r}, expected one of {', '.join(known)}.")
    return prediction_type
