"""Functions for all families of rectified flows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Call, Family

N = 1000
"""The number of timesteps by which their pipelines divide, whatever the scheduler's configuration says."""


def sigma_of(call: Call) -> Tensor:
    """σ (b,) float32."""
    return call.timestep.float() / N


def guidance_of(denoiser: Any, call: Call) -> Tensor | None:
    """The guidance scale (b,) float32 for a denoiser with distilled guidance; None for one without."""
    if not denoiser.config.guidance_embeds:
        return None
    guidance = call.conditions.guidance
    assert guidance is not None
    return torch.full((len(call.sample),), guidance, device=call.sample.device, dtype=torch.float32)


def fit_guidance(pipe: Any, family: Family) -> Family:
    """The family, without guidance if this pipeline's transformer has no distilled guidance."""
    told = family.conditions.guidance if pipe.transformer.config.guidance_embeds else None
    return replace(family, conditions=replace(family.conditions, guidance=told))


def patches_divisor(pipe: Any) -> int:
    """The number that both sides of an image have to be multiples of, with patches of 2 × 2 latents."""
    return pipe.vae_scale_factor * 2
