"""Functions that the families of rectified flows share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Call, Family

N = 1000
"""Timesteps of their schedulers, by which their pipelines divide whatever the scheduler says."""


def sigma_of(call: Call) -> Tensor:
    """σ (b,) float32."""
    return call.timestep.float() / N


def guidance_of(denoiser: Any, call: Call) -> Tensor | None:
    """Return the guidance that a denoiser with distilled guidance is told, (b,) float32; None for one without."""
    if not denoiser.config.guidance_embeds:
        return None
    guidance = call.conditions.guidance
    assert guidance is not None
    return torch.full((len(call.sample),), guidance, device=call.sample.device, dtype=torch.float32)


def fit_guidance(pipe: Any, family: Family) -> Family:
    """A family with distilled guidance, which some of its models lack."""
    told = family.conditions.guidance if pipe.transformer.config.guidance_embeds else None
    return replace(family, conditions=replace(family.conditions, guidance=told))


def patches_divisor(pipe: Any) -> int:
    """Return the number that both sides have to be multiples of, where the denoiser reads patches of 2 × 2 latents."""
    return pipe.vae_scale_factor * 2
