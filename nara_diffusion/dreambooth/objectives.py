"""The training objectives of denoisers, in one table.

At each of N noise levels, least noise first, with latents x and noise ε, the denoiser sees
p x + q ε and the timestep t. It should predict α x + β ε:

    loss = w · mean (prediction − α x − β ε)²

    objective          p         q           α             β           t         λ
    epsilon            √ᾱ        √(1 − ᾱ)    0             1           t         t / N
    v_prediction       √ᾱ        √(1 − ᾱ)    −√(1 − ᾱ)     √ᾱ          t         t / N
    sample             √ᾱ        √(1 − ᾱ)    1             0           t         t / N
    flow_prediction    1 − σ     σ           −1            1           N σ       σ

A rectified flow (arXiv 2209.03003) has σ = s u / (1 + (s − 1) u) at u = 1/N, 2/N, …, 1. Diffusers'
--weighting_scheme sets its w.

Min-SNR-γ (arXiv 2303.09556) weights the squared error in x by min(SNR, γ), with SNR = p² / q². For
a given input, an error e of the prediction is an error q e / (α q − β p) of x, so
w = min(p², γ q²) / (α q − β p)².
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from nara_diffusion.noise.timesteps import (
    FLOW,
    TimestepNoise,
    passes_log_sigma,
    prediction_type,
)

_KINDS = ("epsilon", "v_prediction", "sample", FLOW)


@dataclass(frozen=True)
class Corrupted:
    """A batch after corruption."""

    model_input: Tensor  # (b, c, h, w), what the denoiser sees
    timestep: Tensor  # (b,); an adapter reads λ from it
    target: Tensor  # (b, c, h, w), what the denoiser should return
    weight: Tensor  # (b,), the weight of each sample's mean squared error


@dataclass(frozen=True)
class Objective:
    """The table in the module's docstring, for one scheduler."""

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
        """The same objective with w = 1, for a validation loss."""
        return replace(self, weight=torch.ones_like(self.weight))

    def corrupt(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        """Mix `latents` and `noise` (b, c, h, w) at `indices` (b,). Index 0 has the least noise."""
        indices, factors = indices.cpu(), (self.p, self.q, self.alpha, self.beta)
        p, q, alpha, beta = (rows(factor, indices, latents) for factor in factors)
        return Corrupted(
            model_input=p * latents + q * noise,
            timestep=self.timestep[indices].to(latents.device, non_blocking=True),
            target=alpha * latents + beta * noise,
            weight=self.weight[indices].to(latents.device, non_blocking=True),
        )


def rows(values: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Return values (N,) at `indices` (b,) as (b, 1, 1, 1) float32, on the device of `like`."""
    chosen = values[indices.cpu()].float()
    return chosen[:, None, None, None].to(like.device, non_blocking=True)


def build_objective(
    scheduler: Any,
    *,
    snr_gamma: float | None = None,
    shift: float | None = None,
    weighting_scheme: str = "none",
) -> Objective:
    """Return the objective of a pipeline with this scheduler.

    Args:
        scheduler: the scheduler, `pipe.scheduler`.
        snr_gamma: γ of min-SNR weights; None gives all noise levels the same weight.
        shift: s of a rectified flow. None takes the scheduler's shift, or 1 if that depends on the
            size of the image.
        weighting_scheme: the name of Diffusers' weights for a rectified flow.

    Raises:
        ValueError: the prediction type is unknown, or the schedule has no betas.
    """
    config = scheduler.config
    kind = prediction_type(scheduler) or "epsilon"
    if kind == FLOW:
        if shift is None and not config.get("use_dynamic_shifting"):
            shift = config.get("shift", config.get("flow_shift"))
        objective = _flow(config.num_train_timesteps, float(shift or 1.0), weighting_scheme)
    elif kind in _KINDS and "beta_schedule" in config and not passes_log_sigma(scheduler):
        objective = _discrete(scheduler, kind)
    else:
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {kind!r} can't be trained with. Expected a scheduler "
            f"with betas and discrete timesteps, and one of these types: {', '.join(_KINDS)}."
        )
    if snr_gamma is None:
        return objective
    p, q = objective.p, objective.q
    weight = torch.minimum(p**2, snr_gamma * q**2) / (objective.alpha * q - objective.beta * p) ** 2
    # at SNR 0, ε says nothing about x, and its weight is the limit, 1
    return replace(objective, weight=weight.nan_to_num(1.0).float())


def _discrete(scheduler: Any, kind: str) -> Objective:
    training: Any = DDPMScheduler.from_config(scheduler.config)
    alphas = training.alphas_cumprod.double()  # ᾱ (N,)
    p, q = alphas.sqrt(), (1 - alphas).sqrt()
    one, zero = torch.ones_like(p), torch.zeros_like(p)
    targets = {"epsilon": (zero, one), "v_prediction": (-q, p), "sample": (one, zero)}
    alpha, beta = targets[kind]
    source = TimestepNoise("discrete", num_train_timesteps=len(p))
    return Objective(kind, source, p, q, alpha, beta, torch.arange(len(p)), one.float())


def _flow(levels: int, shift: float, weighting_scheme: str) -> Objective:
    u = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    sigma = shift * u / (1 + (shift - 1) * u)  # (N,)
    one = torch.ones_like(sigma)
    weight = compute_loss_weighting_for_sd3(weighting_scheme, sigma).float()
    source = TimestepNoise("sigma_1000", num_train_timesteps=levels)
    timestep = (levels * sigma).float()
    return Objective(FLOW, source, 1 - sigma, sigma, -one, one, timestep, weight)


def squared_errors(prediction: Tensor, batch: Corrupted, weights: Tensor | None = None) -> Tensor:
    """Return the weighted mean squared error of each sample, (b,) float32.

    Args:
        weights: weights inside of images, (b, 1 or c, h, w).
    """
    errors = (prediction.float() - batch.target.float()) ** 2  # (b, c, h, w)
    if weights is not None:
        errors = errors * weights.to(errors.device, non_blocking=True)
    return batch.weight * errors.flatten(1).mean(1)
