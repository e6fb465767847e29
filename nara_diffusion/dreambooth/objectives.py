"""What a denoiser learns, as one table: at each of N noise levels, least noise first, with latents x and noise ε,

    it sees p x + q ε and its timestep t, and should predict α x + β ε;     loss = w · mean (prediction − α x − β ε)²

    objective          p         q           α             β           t         λ
    epsilon            √ᾱ        √(1 − ᾱ)    0             1           t         t / N
    v_prediction       √ᾱ        √(1 − ᾱ)    −√(1 − ᾱ)     √ᾱ          t         t / N
    sample             √ᾱ        √(1 − ᾱ)    1             0           t         t / N
    flow_prediction    1 − σ     σ           −1            1           N σ       σ
    EDM, F of D        c         c σ         c σ / σ_d     −c σ_d      ¼ ln σ    σ / (1 + σ)

EDM (arXiv 2206.00364, section 5): c = 1 / √(σ² + σ_d²), and F's sign is the other one in "v_prediction"; its loss
w' (D − x)² with w' = 1 / c_out² is that of F with w = 1. A rectified flow (arXiv 2209.03003) has σ = s u / (1 + (s − 1)
u) at u = 1/N, 2/N, …, 1, and Diffusers' --weighting_scheme as its w.

Min-SNR-γ (arXiv 2303.09556) counts the squared error in x min(SNR, γ), SNR = p² / q². Where the error of the prediction
is e and the input is what it is, that of x is q e / (α q − β p), so w = min(p², γ q²) / (α q − β p)².
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from nara_diffusion.noise.denoisers import passes_log_sigma
from nara_diffusion.noise.prediction import FLOW, prediction_by
from nara_diffusion.noise.timesteps import TimestepNoise


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


@dataclass(frozen=True)
class Objective:
    """The table of the module's docstring, for one scheduler.

    Attributes:
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        source: reads λ from `timestep`.
        p, q, alpha, beta: (N,) float64.
        timestep: (N,), int64 for discrete schedules, else float32.
        weight: w (N,) float32.
    """

    prediction_type: str
    source: TimestepNoise
    p: Tensor
    q: Tensor
    alpha: Tensor
    beta: Tensor
    timestep: Tensor
    weight: Tensor

    @property
    def levels(self) -> int:
        """N."""
        return len(self.p)

    @property
    def noise_levels(self) -> Tensor:
        """λ (N,) float32."""
        return self.source.noise_level(self.timestep)

    @property
    def unweighted(self) -> Objective:
        """The same with w = 1, for a validation loss."""
        return replace(self, weight=torch.ones_like(self.weight))

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        """`latents` and `noise` (b, c, h, w) at the noise levels of `indices` (b,), least noise first."""
        indices = indices.cpu()
        p, q, alpha, beta = (rows(values, indices, latents) for values in (self.p, self.q, self.alpha, self.beta))
        return Corrupted(
            model_input=p * latents + q * noise,
            timestep=self.timestep[indices].to(latents.device),
            target=alpha * latents + beta * noise,
            weight=self.weight[indices].to(latents.device),
        )


def rows(values: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """(N,) float64 at `indices` (b,) → (b, 1, 1, 1) float32 on the device of `like`."""
    return values[indices.cpu()].float()[:, None, None, None].to(like.device)


def build_objective(
    scheduler: Any, *, snr_gamma: float | None = None, shift: float | None = None, weighting_scheme: str = "none"
) -> Objective:
    """The objective of a pipeline with this scheduler.

    Args:
        scheduler: `pipe.scheduler`.
        snr_gamma: γ of min-SNR weights; None weights all noise levels alike.
        shift: s of a rectified flow; None takes the scheduler's, 1 where it depends on the image's size.
        weighting_scheme: Diffusers' weights of a rectified flow.

    Raises:
        ValueError: an unknown prediction type, a schedule without betas, or min-SNR with EDM's weights.
    """
    prediction, config = prediction_by(scheduler), scheduler.config
    kind, is_edm = config.get("prediction_type", "epsilon"), passes_log_sigma(scheduler)
    known = ("epsilon", "v_prediction") if is_edm else ("epsilon", "v_prediction", "sample")
    if prediction is not None and prediction.kind == FLOW:
        own = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift")) or 1.0
        objective = _flow(config.num_train_timesteps, float(own if shift is None else shift), weighting_scheme)
    elif kind not in known or not (is_edm or "beta_schedule" in config):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {kind!r} is no schedule to train with: expected one with "
            f"betas, or an EDM one, and one of {', '.join(known)}."
        )
    elif is_edm and snr_gamma is not None:
        raise ValueError(f"snr_gamma is {snr_gamma}, but EDM has weights of its own: leave snr_gamma out.")
    else:
        objective = _edm(scheduler, kind) if is_edm else _discrete(scheduler, kind)
    return objective if snr_gamma is None else replace(objective, weight=_min_snr_weight(objective, snr_gamma))


def _min_snr_weight(objective: Objective, gamma: float) -> Tensor:
    """An ε at SNR 0, which says nothing of x, counts 1, the limit."""
    p, q = objective.p, objective.q
    weight = torch.minimum(p**2, gamma * q**2) / (objective.alpha * q - objective.beta * p) ** 2
    return weight.nan_to_num(1.0).float()


def _discrete(scheduler: Any, kind: str) -> Objective:
    training: Any = DDPMScheduler.from_config(scheduler.config)
    alphas = training.alphas_cumprod.double()  # ᾱ (N,)
    p, q = alphas.sqrt(), (1 - alphas).sqrt()
    one, nothing = torch.ones_like(p), torch.zeros_like(p)
    alpha, beta = {"epsilon": (nothing, one), "v_prediction": (-q, p), "sample": (one, nothing)}[kind]
    source = TimestepNoise("discrete", num_train_timesteps=len(p))
    return Objective(kind, source, p, q, alpha, beta, torch.arange(len(p)), one.float())


def _flow(levels: int, shift: float, weighting_scheme: str) -> Objective:
    u = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    sigma = shift * u / (1 + (shift - 1) * u)  # (N,)
    one, weight = torch.ones_like(sigma), compute_loss_weighting_for_sd3(weighting_scheme, sigma).float()
    source = TimestepNoise("sigma_1000", num_train_timesteps=levels)
    return Objective(FLOW, source, 1 - sigma, sigma, -one, one, (levels * sigma).float(), weight)


def _edm(scheduler: Any, kind: str) -> Objective:
    """Of Diffusers' EDM schedulers, and of Euler's with continuous timesteps, which has σ_d = 1 and w = c²."""
    is_edm = type(scheduler).__name__.startswith("EDM")
    data = float(scheduler.config.sigma_data) if is_edm else 1.0
    own: Any = EDMEulerScheduler if is_edm else EulerDiscreteScheduler
    schedule = own.from_config(scheduler.config)
    timestep = schedule.timesteps.flip(0)  # (N,), EDM's schedulers have num_train_timesteps + 1
    sigma = schedule.sigmas[: len(timestep)].double().flip(0)
    c = (sigma**2 + data**2).rsqrt()
    sign = -1 if kind == "v_prediction" else 1
    weight = torch.ones_like(c) if is_edm else c**2
    source = TimestepNoise("edm", num_train_timesteps=scheduler.config.num_train_timesteps)
    alpha, beta = sign * sigma * c / data, -sign * data * c
    return Objective(kind, source, c, c * sigma, alpha, beta, timestep.float(), weight.float())


def squared_errors(prediction: Tensor, batch: Corrupted) -> Tensor:
    """The weighted mean squared error of each sample, (b,) float32."""
    errors = (prediction.float() - batch.target.float()) ** 2  # (b, c, h, w)
    return batch.weight * errors.flatten(1).mean(1)
