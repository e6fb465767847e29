"""What a denoiser learns, as one table: at each of N noise levels, least noise first, with latents x and noise ε,

    it sees p x + q ε and its timestep t, and should predict α x + β ε;     loss = w · mean (prediction − α x − β ε)²

    objective          p         q           α             β           t         λ
    epsilon            √ᾱ        √(1 − ᾱ)    0             1           t         t / N
    v_prediction       √ᾱ        √(1 − ᾱ)    −√(1 − ᾱ)     √ᾱ          t         t / N
    sample             √ᾱ        √(1 − ᾱ)    1             0           t         t / N
    flow_prediction    1 − σ     σ           −1            1           N σ       σ

A rectified flow (arXiv 2209.03003) has σ = s u / (1 + (s − 1) u) at u = 1/N, 2/N, …, 1, and Diffusers'
--weighting_scheme as its w.

Min-SNR-γ (arXiv 2303.09556) counts the squared error in x min(SNR, γ), SNR = p² / q². Where the error of the prediction
is e and the input is what it is, that of x is q e / (α q − β p), so w = min(p², γ q²) / (α q − β p)².
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from nara_diffusion.noise.prediction import FLOW, KINDS, prediction_by
from nara_diffusion.noise.timesteps import TimestepNoise, passes_log_sigma


@dataclass(frozen=True)
class Corrupted:
    """A batch after corruption."""

    model_input: Tensor  # (b, c, h, w), what the denoiser sees
    timestep: Tensor  # (b,), from which an adapter reads λ
    target: Tensor  # (b, c, h, w), what the denoiser should return
    weight: Tensor  # (b,), what the mean squared error of each sample counts


@dataclass(frozen=True)
class Objective:
    """The table of the module's docstring, for one scheduler."""

    prediction_type: str  # "epsilon", "v_prediction", "sample" or "flow_prediction"
    source: TimestepNoise  # reads λ from `timestep`
    p: Tensor  # (N,) float64, and so are q, α, β
    q: Tensor
    alpha: Tensor
    beta: Tensor
    timestep: Tensor  # (N,), int64 of betas, float32 of a flow
    weight: Tensor  # w (N,) float32

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
        p, q, alpha, beta = (
            rows(values, indices, latents) for values in (self.p, self.q, self.alpha, self.beta)
        )
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
    scheduler: Any,
    *,
    snr_gamma: float | None = None,
    shift: float | None = None,
    weighting_scheme: str = "none",
) -> Objective:
    """The objective of a pipeline with this scheduler.

    Args:
        scheduler: `pipe.scheduler`.
        snr_gamma: γ of min-SNR weights; None weights all noise levels alike.
        shift: s of a rectified flow; None takes the scheduler's, 1 where it depends on the image's size.
        weighting_scheme: Diffusers' weights of a rectified flow.

    Raises:
        ValueError: an unknown prediction type, or a schedule without betas.
    """
    prediction, config = prediction_by(scheduler), scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if prediction is not None and prediction.kind == FLOW:
        own = (
            1.0
            if config.get("use_dynamic_shifting")
            else config.get("shift", config.get("flow_shift")) or 1.0
        )
        objective = _flow(
            config.num_train_timesteps, float(own if shift is None else shift), weighting_scheme
        )
    elif kind in KINDS and "beta_schedule" in config and not passes_log_sigma(scheduler):
        objective = _discrete(scheduler, kind)
    else:
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {kind!r} is no schedule to train with: expected one with "
            f"betas and discrete timesteps, and one of {', '.join(KINDS)}."
        )
    return (
        objective
        if snr_gamma is None
        else replace(objective, weight=_min_snr_weight(objective, snr_gamma))
    )


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
    alpha, beta = {"epsilon": (nothing, one), "v_prediction": (-q, p), "sample": (one, nothing)}[
        kind
    ]
    source = TimestepNoise("discrete", num_train_timesteps=len(p))
    return Objective(kind, source, p, q, alpha, beta, torch.arange(len(p)), one.float())


def _flow(levels: int, shift: float, weighting_scheme: str) -> Objective:
    u = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    sigma = shift * u / (1 + (shift - 1) * u)  # (N,)
    one, weight = (
        torch.ones_like(sigma),
        compute_loss_weighting_for_sd3(weighting_scheme, sigma).float(),
    )
    source = TimestepNoise("sigma_1000", num_train_timesteps=levels)
    return Objective(FLOW, source, 1 - sigma, sigma, -one, one, (levels * sigma).float(), weight)


def squared_errors(prediction: Tensor, batch: Corrupted) -> Tensor:
    """The weighted mean squared error of each sample, (b,) float32."""
    errors = (prediction.float() - batch.target.float()) ** 2  # (b, c, h, w)
    return batch.weight * errors.flatten(1).mean(1)
