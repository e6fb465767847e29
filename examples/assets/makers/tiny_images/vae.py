"""sdxl-tiny's autoencoder: 64 × 64 pixels ↔ 16 × 16 × 4 latents, trained on the renderer's scenes.

    loss = |x − x̂| + 4 |x − x̂|² + |∇x − ∇x̂| + w · KL(q(z|x) ‖ N(0, 1))    each a mean; ∇ is neighbours' difference

The squares see to the colours of small things, which are few pixels but far off when wrong; the gradients keep edges
sharp. w is small: with 1e-3 one of the four channels collapses to its prior, and colours are confused.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_drawings.scenes import SIZE, render, scenes
from tiny_training import Training
from torch import Tensor

SPLIT = "vae"
VALIDATION_SPLIT = "vae-validation"
SQUARES_WEIGHT, KL_WEIGHT = 4.0, 2e-5


def build_vae() -> AutoencoderKL:
    """0.80 M parameters; no attention in the middle, so its cost is linear in the pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def pixels(images: list[Image.Image]) -> Tensor:
    """(b, 3, h, w) in [-1, 1]."""
    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def vae_loss(training: Training) -> dict[str, Tensor]:
    """The loss on the scenes of the present step, and its parts."""
    batch = training.plan.batch
    images = [render(scene) for scene in scenes(SPLIT, training.seed, batch, start=training.step * batch)]
    x = pixels(images).to(training.device)
    vae = training.model
    with training.autocast():
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=training.generator()).to(x.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    decoded = decoded.float()
    absolute = (decoded - x).abs().mean()
    squares = (decoded - x).square().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(_gradients(decoded), _gradients(x), strict=True))
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    loss = absolute + SQUARES_WEIGHT * squares + edges + KL_WEIGHT * kl
    return {"loss": loss, "absolute": absolute, "squares": squares, "edges": edges, "kl": kl}


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, count: int) -> dict[str, float]:
    """Mean absolute error (range 0 to 1) and PSNR in dB on scenes that were not trained on."""
    x = pixels([render(scene) for scene in scenes(VALIDATION_SPLIT, 0, count)]).to(vae.device, vae.dtype)
    decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    error = (decoded.float() - x.float()) / 2
    psnr = -10 * (error**2).mean(dim=(1, 2, 3)).log10()
    return {"absolute_error": error.abs().mean().item(), "psnr": psnr.mean().item()}


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, count: int) -> tuple[float, float]:
    """Mean and standard deviation of the latents of ``count`` scenes, drawn from their posteriors."""
    posteriors = []
    for start in range(0, count, 32):
        x = pixels([render(scene) for scene in scenes(SPLIT, 1, min(32, count - start), start=start)])
        posteriors.append(vae.encode(x.to(vae.device)).latent_dist)
    means = torch.cat([posterior.mean for posterior in posteriors])
    variance = means.var() + torch.cat([posterior.var for posterior in posteriors]).mean()
    return means.mean().item(), variance.sqrt().item()
