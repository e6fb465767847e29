"""What a denoiser learns: from clean latents x (b, c, h, w) to what it sees, what it should say, how much that counts.

Discrete schedules (`DiscreteObjective`), ᾱ_t from the scheduler, λ = t / N:

    x_t = √ᾱ x + √(1 − ᾱ) ε;   target  ε ("epsilon"),  v = √ᾱ ε − √(1 − ᾱ) x ("v_prediction"),  x ("sample")
    min-SNR-γ (arXiv 2303.09556), SNR = ᾱ / (1 − ᾱ): the squared error in x counts min(SNR, γ), which is
    min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v and min(SNR, γ) for x

A rectified flow (`FlowObjective`, arXiv 2209.03003), λ = σ = 1/N, 2/N, …, 1, the denoiser's timestep N σ:

    x_σ = (1 − σ) x + σ ε;   target  ε − x ("flow_prediction");   x̂ = x_σ − σ · prediction
    SNR = (1 − σ)² / σ², so that min-SNR-γ is  σ² min(SNR, γ) = min((1 − σ)², γ σ²)

EDM's terms (`PreconditionedObjective`, arXiv 2206.00364, section 5), x_σ = x + σ ε, the network F reads c_in x_σ:

    D = c_skip x_σ + c_out F;   loss = w (D − x)²;   target of F = (x − c_skip x_σ) / c_out

With an EDM scheduler σ_d is its `sigma_data`, c_in = 1 / √(σ² + σ_d²), c_skip = σ_d² / (σ² + σ_d²), |c_out| =
σ σ_d / √(σ² + σ_d²), w = 1 / c_out², the paper's, and the timestep is ¼ ln σ: λ = σ / (1 + σ). With any other
scheduler σ = √((1 − ᾱ) / ᾱ) at its discrete timesteps, w = σ⁻², and D is what an ε- or v-model means by F. All is
computed as w c_out² (F − target)², in float32: there is no cancellation at small σ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from nara_diffusion.noise.timesteps import TimestepNoise

from .distances import SQUARED, Distance

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Corrupted:
    """A batch after corruption.

    Attributes:
        model_input: (b, c, h, w), what the denoiser sees.
        timestep: (b,), its argument, from which an adapter reads λ.
        target: (b, c, h, w), what it should return.
        weight: (b,), what the mean squared error of each sample counts.
    """

    model_input: Tensor
    timestep: Tensor
    target: Tensor
    weight: Tensor


class Objective(Protocol):
    """`source` tells λ from the timesteps of `corrupt`, which takes indices of `levels` noise levels."""

    source: TimestepNoise
    levels: int

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted: ...


class DiscreteObjective:
    """See the module's docstring.

    Args:
        scheduler: the pipeline's.
        snr_gamma: γ of min-SNR weights; None weights all timesteps alike.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.prediction_type = _prediction_type(scheduler, PREDICTION_TYPES)
        self.snr_gamma = snr_gamma
        training: Any = DDPMScheduler.from_config(scheduler.config)
        self.alphas: Tensor = training.alphas_cumprod.double()  # ᾱ (N,)
        self.levels = len(self.alphas)
        self.source = TimestepNoise("discrete", num_train_timesteps=self.levels)

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        """`indices` (b,) are timesteps."""
        alphas = self.alphas.to(latents.device)[indices]  # (b,)
        signal, sigma = _column(alphas.sqrt()), _column((1 - alphas).sqrt())  # (b, 1, 1, 1)
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


class FlowObjective:
    """See the module's docstring.

    Args:
        snr_gamma: γ of min-SNR weights; None weights all σ alike.
        levels: N, how many σ there are; those of Diffusers' flow schedulers by default.
    """

    prediction_type = "flow_prediction"

    def __init__(self, snr_gamma: float | None = None, levels: int = 1000) -> None:
        self.snr_gamma = snr_gamma
        self.levels = levels
        self.source = TimestepNoise("sigma_1000", num_train_timesteps=levels)
        self.sigmas = torch.arange(1, levels + 1, dtype=torch.float64) / levels  # (N,)

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        """`indices` (b,) into the σ, least noise first."""
        sigma = self.sigmas.to(latents.device)[indices]  # (b,)
        return Corrupted(
            model_input=_column(1 - sigma) * latents + _column(sigma) * noise,
            timestep=(self.levels * sigma).float(),
            target=noise - latents,
            weight=self._weight(sigma),
        )

    def _weight(self, sigma: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones_like(sigma, dtype=torch.float32)
        return torch.minimum((1 - sigma) ** 2, self.snr_gamma * sigma**2).float()


class PreconditionedObjective:
    """See the module's docstring.

    Args:
        scheduler: the pipeline's.
    """

    def __init__(self, scheduler: Any) -> None:
        self.is_edm = is_edm(scheduler)
        self.prediction_type = _prediction_type(scheduler, PREDICTION_TYPES[:2])
        kind: Any = EDMEulerScheduler if self.is_edm else EulerDiscreteScheduler
        scheduler = kind.from_config(scheduler.config)
        meaning = "edm" if self.is_edm or _is_continuous(scheduler) else "discrete"
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
        noisy = latents + _column(sigma) * noise
        if self.is_edm or self.prediction_type == "v_prediction":
            # (x − c_skip x_σ) / c_out, written out: σ x / (σ_d √) − σ_d ε / √ with √ = √(σ² + σ_d²)
            target = _column(sigma * c_in / data) * latents - _column(data * c_in) * noise
        else:
            target, c_out = noise, sigma  # D = x_σ − σ F
        if self.prediction_type == "v_prediction":
            target = -target  # c_out is negative there
        return Corrupted(
            model_input=_column(c_in) * noisy,
            timestep=self._timestep(latents.device, indices),
            target=target,
            weight=(torch.ones_like(sigma) if self.is_edm else (c_out / sigma) ** 2).float(),
        )

    def _timestep(self, device: torch.device, indices: Tensor) -> Tensor:
        timestep = self.timesteps.to(device)[indices]
        return timestep.float() if self.source.meaning == "edm" else timestep.round().long()


def is_edm(scheduler: Any) -> bool:
    """Whether a scheduler is one of Diffusers' EDM ones."""
    return type(scheduler).__name__.startswith("EDM")


def _is_continuous(scheduler: Any) -> bool:
    return scheduler.config.get("timestep_type") == "continuous"


def build_objective(scheduler: Any, *, edm_style: bool = False, snr_gamma: float | None = None) -> Objective:
    """The objective for a pipeline with this scheduler.

    Args:
        scheduler: `pipe.scheduler`.
        edm_style: EDM's terms; an EDM scheduler needs them and has them in any case.
        snr_gamma: γ of min-SNR weights, or None.

    Raises:
        ValueError: an unknown prediction type, a schedule without ᾱ, min-SNR in EDM's terms, or EDM's terms of a flow.
    """
    if scheduler.config.get("prediction_type") == FlowObjective.prediction_type:
        if edm_style:
            raise ValueError("a rectified flow has no EDM terms: leave do_edm_style_training out.")
        return FlowObjective(snr_gamma, scheduler.config.num_train_timesteps)
    if not (edm_style or is_edm(scheduler) or _is_continuous(scheduler)):
        return DiscreteObjective(scheduler, snr_gamma)
    if snr_gamma is not None:
        raise ValueError(
            f"snr_gamma is {snr_gamma}, but EDM-style training has weights of its own: leave snr_gamma out, or "
            f"{'use another model' if is_edm(scheduler) else 'train without do_edm_style_training'}."
        )
    return PreconditionedObjective(scheduler)


def squared_errors(prediction: Tensor, batch: Corrupted) -> Tensor:
    """The weighted mean squared error of each sample, (b,) float32."""
    return weighted_errors(prediction, batch, SQUARED)


def weighted_errors(prediction: Tensor, batch: Corrupted, distance: Distance) -> Tensor:
    """The weighted mean distance of each sample's prediction from its target, (b,) float32.

    Min-SNR's and EDM's weights, which are made for squares, multiply other distances as they are.
    """
    errors = distance(prediction.float() - batch.target.float())  # (b, c, h, w)
    return batch.weight * errors.flatten(1).mean(1)


def with_prior(losses: Tensor, prior_loss_weight: float) -> Tensor:
    """ℓ_i + w ℓ'_i (b,) of a doubled batch of losses (2b,): b instance images, then b class images.

    The losses carry their samples' own weights already, so that min-SNR and the prior go together.

    Raises:
        ValueError: the batch isn't a doubled one.
    """
    if len(losses) % 2:
        raise ValueError(f"a batch with class images has as many of them as instance images, got {len(losses)} in all.")
    instance, prior = losses.chunk(2)
    return instance + prior_loss_weight * prior


def _prediction_type(scheduler: Any, known: tuple[str, ...]) -> str:
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


def _column(values: Tensor) -> Tensor:
    """(b,) float64 → (b, 1, 1, 1) float32."""
    return values.float()[:, None, None, None]
