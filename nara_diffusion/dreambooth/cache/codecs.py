"""Codecs turn pixels into an autoencoder's posterior, and its z into the latents that a denoiser sees.

    autoencoder                      latents of z (b, c, h, w)
    AutoencoderKL                    (z − shift_factor) · scaling_factor, or (z − m) · scaling_factor / d
    Wan's, Qwen-Image's              (z − m) / d, of videos with one frame
    FLUX.2's                         patches of 2 × 2, (b, 4 c, h / 2, w / 2), then (z − μ) / √(v + ε) of its batch norm

m and d are the configuration's `latents_mean` and `latents_std`, where it has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def posterior_of(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """μ and σ (b, c, h, w) of images (b, 3, h, w)."""
    video = reads_videos(vae)
    posterior = vae.encode(pixels[:, :, None] if video else pixels).latent_dist
    return (posterior.mean[:, :, 0], posterior.std[:, :, 0]) if video else (posterior.mean, posterior.std)


def scale_latents(vae: Any, z: Tensor) -> Tensor:
    """z (b, c, h, w) of the autoencoder → the latents that the denoiser sees."""
    if hasattr(vae, "bn"):
        return _normalized_patches(vae, z)
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None or std is None:
        return (z - (getattr(config, "shift_factor", None) or 0.0)) * scale
    mean, std = (torch.tensor(value, dtype=z.dtype, device=z.device).view(1, -1, 1, 1) for value in (mean, std))
    return (z - mean) * scale / std


def reads_videos(vae: Any) -> bool:
    """Return whether an autoencoder takes (b, 3, frames, h, w)."""
    return "temperal_downsample" in vae.config


def to_patches(z: Tensor) -> Tensor:
    """(b, c, h, w) → (b, 4 c, h / 2, w / 2): the channels of each 2 × 2 patch, row by row within a channel."""
    b, c, h, w = z.shape
    patches = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)  # (b, c, 2, 2, h / 2, w / 2)
    return patches.reshape(b, 4 * c, h // 2, w // 2)


def _normalized_patches(vae: Any, z: Tensor) -> Tensor:
    mean, variance = (t.to(z.device, z.dtype).view(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
    return (to_patches(z) - mean) / (variance + vae.config.batch_norm_eps).sqrt()
