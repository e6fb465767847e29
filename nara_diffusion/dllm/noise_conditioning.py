"""Passing λ, and the mask density if a core reads it, to the noise-aware parts of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from nara_diffusion.noise.context import noise_level as noise_level_of
from nara_diffusion.noise.needs import mask_density_radius
from nara_diffusion.noise.signals import MASKED_SHARE
from nara_diffusion.runtime.modules import find_holders


def conditioned(
    model: nn.Module, noise_level: torch.Tensor, *, masked: torch.Tensor, answer: torch.Tensor
) -> AbstractContextManager:
    """The context `noise_level(model, λ)` for a noise-aware model; a context that does nothing for any other.

    λ is the masked share. Adapters that were made without a `noise_convention` have this one from now on. Those that
    are merged at one λ refuse forwards at others, unless Diffusers' `fuse_lora` merged them, as of images.

    Args:
        model: the outermost module.
        noise_level: (b,) float32, λ.
        masked, answer: (b, l) bool; they give the mask density.

    Raises:
        ValueError: an adapter that needs λ was trained with another definition of it.
    """
    holders = find_holders(model)
    if not any(holder.needs_noise or holder.merged_level.is_binding for holder in holders):
        return nullcontext()
    for holder in holders:
        for name, other in holder.adopt_convention(MASKED_SHARE).items():
            raise ValueError(
                f"Adapter '{name}' was trained with λ defined as {other!r}, and is about to be told {MASKED_SHARE!r}, "
                "the masked share of the answer: use an adapter that was trained with that, or call the model yourself "
                "inside `with noise_level(model, value):`."
            )
    radius = mask_density_radius(model)
    density = None if radius is None else mask_density(masked, answer, radius)
    return noise_level_of(model, noise_level, mask_density=density)


def mask_density(masked: torch.Tensor, answer: torch.Tensor, radius: int) -> torch.Tensor:
    """The mask density of each row: (b,) float32 in [0, 1].

    For each masked token the share of masked ones among its neighbours, the answer's tokens at distance 1 … radius
    to either side, and then the mean over the masked tokens of a row. A token without neighbours, and a row
    without masks, count 0.

    Args:
        masked: (b, l) bool.
        answer: (b, l) bool; positions outside of it are no neighbours.
        radius: R ≥ 1, in tokens.
    """
    window = torch.ones(1, 1, 2 * radius + 1, dtype=torch.float32, device=masked.device)
    window[..., radius] = 0  # itself excluded

    def count(flags: torch.Tensor) -> torch.Tensor:
        return F.conv1d(flags.float()[:, None], window, padding=radius)[:, 0]  # (b, l)

    share = count(masked & answer) / count(answer).clamp(min=1)  # (b, l)
    return (share * masked).sum(1) / masked.sum(1).clamp(min=1)
