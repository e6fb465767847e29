"""What a converted model learns to say: the objectives of the regime "conversion".

    eps_to_v      v = √ᾱ ε − √(1 − ᾱ) x           on the schedule that the base has
    eps_to_flow   u = ε − x                       on x_σ = (1 − σ) x + σ ε, timestep 1000 σ: a rectified flow
    zero_snr      v                               on that schedule rescaled so that ᾱ of the last timestep is 0
    eps           ε                               what the base was trained for

The denoiser's argument stays a timestep of [0, 1000], so that λ = timestep / 1000 in each of them.
"""

from __future__ import annotations

from typing import Any

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from nara_diffusion import TimestepNoise
from nara_diffusion.dreambooth.objectives import Corrupted, DiscreteObjective, Objective

CONVERSIONS = ("eps_to_v", "eps_to_flow", "zero_snr")
LEVELS = 1000

_CHANGES: dict[str, dict[str, Any]] = {
    "eps": {},
    "eps_to_v": {"prediction_type": "v_prediction"},
    "zero_snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


class FlowObjective:
    """The velocity of a rectified flow; index i is σ = (i + 1) / N, as FlowMatchEulerDiscreteScheduler has it."""

    levels = LEVELS
    source = TimestepNoise("discrete", num_train_timesteps=LEVELS)

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        timestep = indices + 1  # (b,)
        sigma = (timestep.double() / self.levels).float()[:, None, None, None]  # (b, 1, 1, 1)
        return Corrupted(
            model_input=(1 - sigma) * latents + sigma * noise,
            timestep=timestep,
            target=noise - latents,
            weight=latents.new_ones(len(indices)),
        )


def build_conversion(name: str, scheduler: Any) -> Objective:
    """The objective `name` for a base whose pipeline has `scheduler`.

    Raises:
        ValueError: there is no such objective.
    """
    if name == "eps_to_flow":
        return FlowObjective()
    if name not in _CHANGES:
        raise ValueError(f"objective is {name!r}, expected one of {', '.join(('eps', *CONVERSIONS))}.")
    return DiscreteObjective(DDPMScheduler.from_config(scheduler.config, **_CHANGES[name]))
