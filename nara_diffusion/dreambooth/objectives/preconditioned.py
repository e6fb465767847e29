"""EDM's terms (arXiv 2206.00364, section 5), x_σ = x + σ ε, the network F reads c_in x_σ:

    D = c_skip x_σ + c_out F;   loss = w (D − x)²;   target of F = (x − c_skip x_σ) / c_out

With an EDM scheduler σ_d is its `sigma_data`, c_in = 1 / √(σ² + σ_d²), c_skip = σ_d² / (σ² + σ_d²), |c_out| =
σ σ_d / √(σ² + σ_d²), w = 1 / c_out², the paper's, and the timestep is ¼ ln σ: λ = σ / (1 + σ). With any other
scheduler σ = √((1 − ᾱ) / ᾱ) at its discrete timesteps, w = σ⁻², and D is what an ε- or v-model means by F. All is
computed as w c_out² (F − target)², in float32: there is no cancellation at small σ.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from nara_diffusion.noise.timesteps import TimestepNoise

from .discrete import PREDICTION_TYPES, checked_prediction_type
from .terms import Corrupted, column


class PreconditionedObjective:
    """See the module's docstring.

    Args:
        scheduler: the pipeline's.
    """

    def __init__(self, scheduler: Any) -> None:
        self.is_edm = is_edm(scheduler)
        self.prediction_type = checked_prediction_type(scheduler, PREDICTION_TYPES[:2])
        kind: Any = EDMEulerScheduler if self.is_edm else EulerDiscreteScheduler
        scheduler = kind.from_config(scheduler.config)
        meaning = "edm" if self.is_edm or is_continuous(scheduler) else "discrete"
        self.source = TimestepNoise(meaning, num_train_timesteps=scheduler.config.num_train_timesteps)
        self.levels = len(scheduler.timesteps)  # EDM's schedulers have N + 1
        # schedulers go from noise to data, indices here from data to noise
        self.sigmas = scheduler.sigmas[: self.levels].double().flip(0)  # (N,)
        self.timesteps = scheduler.timesteps.double().flip(0)  # (N,)
        self.sigma_data = float(scheduler.config.sigma_data) if self.is_edm else 1.0

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        """`indices` (b,) into the schedule's σ, least noise first."""
        sigma = self.sigmas.to(latents.device)[indices]  # (b,)
        variance, data = sigma**2 + self.sigma_data**2, self.sigma_data
        c_in, c_out = variance.rsqrt(), sigma * data / variance.sqrt()
        noisy = latents + column(sigma) * noise
        if self.is_edm or self.prediction_type == "v_prediction":
            # (x − c_skip x_σ) / c_out, written out: σ x / (σ_d √) − σ_d ε / √ with √ = √(σ² + σ_d²)
            target = column(sigma * c_in / data) * latents - column(data * c_in) * noise
        else:
            target, c_out = noise, sigma  # D = x_σ − σ F
        if self.prediction_type == "v_prediction":
            target = -target  # c_out is negative there
        return Corrupted(
            model_input=column(c_in) * noisy,
            timestep=self._timestep(latents.device, indices),
            target=target,
            weight=(torch.ones_like(sigma) if self.is_edm else (c_out / sigma) ** 2).float(),
        )

    def _timestep(self, device: torch.device, indices: Tensor) -> Tensor:
        timestep = self.timesteps.to(device)[indices]
        return timestep.float() if self.source.meaning == "edm" else timestep.round().long()


def is_edm(scheduler: Any) -> bool:
    """Return whether a scheduler is one of Diffusers' EDM ones."""
    return type(scheduler).__name__.startswith("EDM")


def is_continuous(scheduler: Any) -> bool:
    """Return whether a scheduler passes ¼ ln σ to the denoiser without being one of EDM's."""
    return scheduler.config.get("timestep_type") == "continuous"
